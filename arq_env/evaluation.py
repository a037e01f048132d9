"""From a bit-width map to its evaluation: quantize, then certify on the reward split; remembered by map."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice

import numpy as np
import torch
from scipy import stats

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, check_map
from arq_env.networks.training import noisy_accuracy
from arq_env.problem import Problem
from arq_env.quantization import Quantizer
from arq_env.quantization.exact import exact_means
from arq_env.rewards import REWARDS, CertifierSettings, Figures, Soft
from arq_env.sensitivity import Divergence, SecondOrder, Sensitivities, estimate_sensitivities
from arq_env.support.engines import Engine
from arq_env.support.errors import ArqError

#: A quantized network with so many times FP32's ACR says that something is wrong with FP32.
STRANGE = 1.5
#: Of the rewards: a new number wherever the same map would get another one, so that no trace holds two kinds (1: confidence
#: alone won reward; 2: logits are compared at FP32's mean entropy, on 2,000 images and one sample of each, in exact arithmetic).
REWARD_VERSION = 2
#: The base network is taken not to know noise when it loses more than this share of its accuracy to it.
NOISE_LOSS = 0.5
#: The base network is refused when guessing would certify as many images with this probability.
LUCK = 0.05
#: Workers that share one evaluation, at most: each quantizes the network anew, a fifth of the work.
MOST_PARTS = 8


@dataclass(frozen=True)
class Evaluation:
    """What the reward certifier says of one network.

    :param acr: average certified radius (of "soft": as estimated), in units of pixels in [0, 1]
    :param clean_accuracy: of the smoothed classifier
    :param certified_accuracy: at radius sigma / 2
    :param seconds: it took
    """

    acr: float
    clean_accuracy: float
    certified_accuracy: float
    seconds: float


class Evaluator:
    """Evaluates maps on one problem, each once.

    :param problem: network, data and sigma
    :param settings: of the reward certifier
    :param quantizer: that of another evaluator on this problem, for the same calibration
    """

    def __init__(self, problem: Problem, settings: CertifierSettings = CertifierSettings(), *, quantizer: Quantizer | None = None):
        if problem.any_bits is not None and settings.regained_bits:
            raise ArqError("weights that stand any map are judged as they are: leave regained_bits at 0")
        self.problem, self.settings = problem, settings
        self._calibrates = quantizer is None
        if quantizer is not None:
            self.quantizer = quantizer
        #: What runs evaluations beside each other, see :meth:`evaluate_many`.
        self.engine = Engine()
        self._known: dict[tuple, Evaluation] = {}
        self._reward = REWARDS[settings.reward_method](problem, settings)

    def __getstate__(self):
        """What is pickled and copied: what was measured, but no network, image or noise that can be made again."""
        return {name: value for name, value in vars(self).items() if name not in ("quantizer", "divergence")} | {"engine": Engine()}

    @cached_property
    def quantizer(self) -> Quantizer:
        """Calibrated at first use."""
        problem = self.problem
        images = problem.calibration_images(self.settings.seed, self.settings.calibration_images)
        return problem.quantizer(images)

    @cached_property
    def rounding(self) -> str:
        """What a reward depends on beside everything else: "exact" where nothing, else the processor's kernels and threads."""
        if self.problem.device.type == "cpu" and self._reward.exact and self.quantizer.exact():
            return "exact"
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

    @cached_property
    def divergence(self) -> Divergence:
        """How far a map's predictions are from FP32's, a function."""
        return Divergence(self.problem, self.quantizer, self.settings.seed)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """What few bits cost in each place, found at first use by :func:`arq_env.sensitivity.forward_passes`: about two
        evaluations' worth.
        """
        order = SecondOrder(self.problem, self.quantizer, self.settings.seed)
        found, skipped = estimate_sensitivities(order, self.engine.map), self.settings.regained_bits
        return {
            (layer, kind): effects[skipped:] + effects[-1:] * skipped if kind == "weight" else effects
            for (layer, kind), effects in found.items()
        }

    @cached_property
    def reference(self) -> Evaluation:
        """The FP32 network under the same certifier; warns when it never saw noise.

        :raises ArqError: when it is no better than chance under noise, so that there is nothing to compare with
        """
        warn_if_noise_is_new(self.problem)
        evaluation = self._timed(self._reward.reference)
        images, chance = self.settings.images, 1 / len(self.problem.dataset.classes)
        luck = stats.binom.sf(round(evaluation.clean_accuracy * images) - 1, images, chance)
        if evaluation.acr == 0 or luck > LUCK:
            raise ArqError(
                f"the FP32 network certifies {evaluation.clean_accuracy:.1%} of the {images} reward images at sigma "
                f"{self.problem.sigma}, no more than luck might: use the right weights, trained under this noise"
            )
        return evaluation

    def evaluate(self, bit_widths: BitWidthMap) -> Evaluation:
        """Evaluate a map, or recall its evaluation.

        :raises ArqError: when it is not a map for this network
        """
        return self.evaluate_many([bit_widths])[0]

    def evaluate_many(self, maps: Sequence[BitWidthMap]) -> list[Evaluation]:
        """Evaluate maps, or recall their evaluations.

        Workers of :attr:`engine` take a map each or, where there are fewer maps, some of the reward images of one; but only where
        rewards are exact, so that it does not matter who makes them.

        :raises ArqError: when one is not a map for this network
        """
        keys = [tuple(bit_widths.items()) for bit_widths in maps]
        new = {key: self.regained(dict(key)) for key in keys if key not in self._known}
        reward = self._reward
        made: Iterable[Evaluation] = (self._evaluate_here(regained) for regained in new.values())
        if new and self.engine.workers > 1 and isinstance(reward, Soft) and self._calibrates and self.rounding == "exact":
            made = self._evaluate_in_parts(reward, list(new.values()))
        for key, evaluation in zip(new, made, strict=True):
            self._known[key] = evaluation
            if "reference" in vars(self) and evaluation.acr > STRANGE * self.reference.acr:
                warnings.warn(
                    f"a quantized network has {evaluation.acr / self.reference.acr:.1f} times the ACR of the FP32 network, which "
                    f"therefore seems not to be trained under noise of sigma {self.problem.sigma}: its rewards mean nothing",
                    stacklevel=2,
                )
        return [self._known[key] for key in keys]

    def _evaluate_here(self, regained: BitWidthMap) -> Evaluation:
        quantizer = self.quantizer  # calibrated before the clock starts
        return self.measure(lambda: quantizer.quantize(regained, integers=True))

    def _evaluate_in_parts(self, reward: Soft, regained: list[BitWidthMap]) -> Iterator[Evaluation]:
        """Evaluate in the engine's workers, which are sent the network once, and then maps."""
        parts = min(max(1, self.engine.workers // len(regained)), MOST_PARTS, reward.most_parts)
        tasks = [(bit_widths, part, parts) for bit_widths in regained for part in range(parts)]
        done = self.engine.map(partial(_logits_of_part, Evaluator(self.problem, self.settings)), tasks)
        while some := list(islice(done, parts)):
            logits, seconds = zip(*some, strict=True)
            yield Evaluation(*reward.figures(torch.from_numpy(np.concatenate(logits))), max(seconds))

    def regained(self, bit_widths: BitWidthMap) -> BitWidthMap:
        """The map whose network is judged in place of a map's, see :class:`CertifierSettings`.

        :raises ArqError: when it is not a map for this network
        """
        check_map(bit_widths, self.problem.layers)
        won = self.settings.regained_bits
        return {name: Bits(min(weight + won, MAX_BITS), activation) for name, (weight, activation) in bit_widths.items()}

    def remember(self, bit_widths: BitWidthMap, evaluation: Evaluation) -> None:
        """Take over an evaluation made earlier under the same settings, such as one from a trace."""
        self._known[tuple(bit_widths.items())] = evaluation

    def remember_sensitivities(self, sensitivities: Sensitivities) -> None:
        """Take over sensitivities measured earlier under the same settings."""
        self.sensitivities = sensitivities

    def second_opinion(self) -> "Evaluator":
        """An evaluator on draws that this one never saw: images, noise and calibration images.

        The best of many maps is in part the luckiest on what it was chosen by; on fresh draws luck does not count. The images are
        what is left of the reward split, at most twice as many as here, and where nothing is left as many training images.
        """
        s, there = self.settings, self.problem.dataset
        start = s.first + s.images
        left = len(there.reward.images) - start
        fresh = replace(s, seed=(s.seed + 1) % 2**32)
        if left > 0 and s.part == "reward":
            other = replace(fresh, images=min(2 * s.images, left), first=start)
        else:
            other = replace(fresh, images=min(2 * s.images, len(there.train.images)), part="train", first=0)
        opinion = Evaluator(self.problem, other)
        opinion.engine = self.engine
        return opinion

    def measure(self, build: Callable[[], torch.nn.Module]) -> Evaluation:
        """What the reward certifier says of the network that ``build`` makes, whose making counts to the seconds."""
        return self._timed(lambda: self._reward.judge(build()))

    def _timed(self, figures: Callable[[], Figures]) -> Evaluation:
        self._reward.prepare()  # before the clock starts
        start = time.perf_counter()
        with exact_means():
            got = figures()
        return Evaluation(*got, time.perf_counter() - start)


def _logits_of_part(evaluator: Evaluator, task: tuple[BitWidthMap, int, int]) -> tuple[np.ndarray, float]:
    """Logits of a map's network on one of so many parts of the noisy reward images, float64 [images, n, classes]; and seconds.

    :param evaluator: a worker's own; it calibrates at its first part
    """
    bit_widths, part, parts = task
    quantizer, reward = evaluator.quantizer, evaluator._reward
    assert isinstance(reward, Soft)
    start = time.perf_counter()
    with exact_means():
        logits = reward.logits(quantizer.quantize(bit_widths, integers=True), part, parts)
    return logits.numpy(), time.perf_counter() - start


def warn_if_noise_is_new(problem: Problem, count: int = 256) -> None:
    """Warn when the base network loses over half of its accuracy under noise: its certificates will be empty."""
    split = problem.dataset.reward
    images, labels = split.images[:count], split.labels[:count]
    clean = noisy_accuracy(problem.network, images, labels, sigma=0.0)
    noisy = noisy_accuracy(problem.network, images, labels, sigma=problem.sigma)
    # A network that learned noise can be worse on clean images than on noisy ones, so the better of the two is the measure.
    chance = 1 / len(problem.dataset.classes)
    if noisy - chance < NOISE_LOSS * (max(clean, noisy) - chance):
        warnings.warn(
            f"the base network has accuracy {clean:.2f} on clean images and {noisy:.2f} under noise of sigma {problem.sigma}: "
            "it seems not to be trained under this noise, so expect small radii (sigma is in units of pixels in [0, 1])",
            stacklevel=2,
        )
