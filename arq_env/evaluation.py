"""From a bit-width map to its evaluation: quantize, then certify on the reward split; remembered by map."""

import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from scipy import stats

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, BitWidthMap, check_map
from arq_env.certification import METHODS, Incremental, Method, Paired, Sequential, cache_predictions, certify
from arq_env.certification.soft import logits_of_copies, mean_entropy, noisy_copies, radius_of_logits
from arq_env.networks.training import noisy_accuracy
from arq_env.problem import CALIBRATION_IMAGES, Problem
from arq_env.quantization import Quantizer
from arq_env.quantization.exact import exact_means
from arq_env.sensitivity import Divergence, Sensitivities, measure_sensitivities
from arq_env.support.errors import ArqError

#: Of the rewards: a new number wherever the same map would get another one, so that no trace holds two kinds (1: confidence
#: alone won reward; 2: logits are compared at FP32's mean entropy, on 2,000 images and one sample of each, in exact arithmetic).
REWARD_VERSION = 2
#: The base network is taken not to know noise when it loses more than this share of its accuracy to it.
NOISE_LOSS = 0.5
#: The base network is refused when guessing would certify as many images with this probability.
LUCK = 0.05
#: Samples of the FP32 network for each one that an incremental reward replays: a one-off cost, which makes its bound tight.
CACHE_FACTOR = 16
#: Most values of noisy images that are kept from evaluation to evaluation (256 MiB).
KEPT_VALUES = 2**26
#: Decimal places of an ACR that count; and of FP32's figures, whose convolutions every processor rounds in its own way.
PLACES, FP32_PLACES = 9, 5
#: Noise samples an image that a reward may ask for: a hundred times those of the field's largest certificates.
MOST_SAMPLES = 10_000_000
#: How the ACR of a reward can be measured: estimated by :func:`arq_env.certification.soft_radius`, or certified.
REWARD_METHODS = ("soft", *METHODS)


def whole_number(name: str, value, low: int, high: float) -> int:
    """``value`` as Python's int, also where it is NumPy's.

    :raises ArqError: unless it is a whole number from ``low`` to ``high``, a bool not being one
    """
    if isinstance(value, bool) or not (isinstance(value, numbers.Integral) and low <= value <= high):
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ArqError(f"{name} is {value!r}: give a whole number {limits}")
    return int(value)


@dataclass(frozen=True)
class CertifierSettings:
    """How the reward is measured: by default the soft smoothed classifier's radius, from few noise samples for each of many images.

    These radii are for comparing maps; figures to quote are certified with more samples.

    :param images: number of images of the reward split
    :param first: index of the first of them
    :param n: noise samples an image: one for each of many images tells maps apart better than several for each of few
    :param calibration_images: training images for ranges of activations and BatchNorm's statistics
    :param part: "reward", or "train" for training images in place of the reward split's, drawn by ``seed``
    :param n0: noise samples that select an image's class before; not for "soft"
    :param alpha: error probability of each radius; not for "soft"
    :param seed: of noise and calibration; the same for all maps, so that they are compared on the same noise
    :param regained_bits: bits by which a map's weights are taken to be finer than they are, since fine-tuning
        (:func:`arq_env.quantization.finetuning.finetune`) wins about that back, and nothing of what activations lose. 1 ranks maps
        as they rank once finished; 0 takes the network as it is quantized
    :param reward_method: "soft" (:func:`arq_env.certification.soft_radius`, every network's logits scaled to FP32's mean
        entropy, so that confidence alone wins nothing) or a method of :func:`arq_env.certification.certify`, which wants an n
        of at least 8; of these "incremental" and "paired" bound the difference to the FP32 network, which is run once on 16 n
        samples, and need n of 100 or more for radii worth comparing
    """

    images: int = 2_000
    n0: int = 4
    n: int = 1
    alpha: float = 0.3
    seed: int = 0
    first: int = 0
    reward_method: str = "soft"
    regained_bits: int = 0
    calibration_images: int = CALIBRATION_IMAGES
    part: str = "reward"

    def __post_init__(self):
        if not isinstance(self.reward_method, str) or self.reward_method not in REWARD_METHODS:
            raise ArqError(f"there is no reward method {self.reward_method!r}: choose one of {', '.join(REWARD_METHODS)}")
        for name, low, high in (
            ("images", 1, math.inf),
            ("n0", 1, MOST_SAMPLES),
            ("n", 1, MOST_SAMPLES),
            ("seed", 0, 2**32 - 1),
            ("first", 0, math.inf),
            ("regained_bits", 0, MAX_BITS - MIN_BITS),
            ("calibration_images", 2, math.inf),
        ):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low, high))
        if not isinstance(self.part, str) or self.part not in ("reward", "train"):
            raise ArqError(f"part is {self.part!r}: give 'reward' or 'train'")
        if isinstance(self.alpha, bool) or not (isinstance(self.alpha, numbers.Real) and 0 < self.alpha < 1):
            raise ArqError(f"alpha is {self.alpha!r}: give the probability of failure, in (0, 1)")
        object.__setattr__(self, "alpha", float(self.alpha))  # so that it can be written as JSON

    @property
    def forward_passes(self) -> int:
        """Noisy images that an evaluation sends through the quantized network, at most, calibration included."""
        return self.calibration_images + self.images * (self.n if self.reward_method == "soft" else self.n0 + self.n)


def settings_of(document: dict) -> CertifierSettings:
    """How the search that found a map was rewarded, from the entries of the map's file; the defaults where they do not say.

    :raises ArqError: when they say what no search has
    """
    made_with = document.get("provenance", {})
    try:
        return CertifierSettings(**made_with.get("certifier", {}))
    except (TypeError, AttributeError) as error:
        raise ArqError(
            f"the map's certifier is not one of a search ({error}): restore the file, or leave that entry out"
        ) from error


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
    """

    def __init__(self, problem: Problem, settings: CertifierSettings = CertifierSettings()):
        self.problem, self.settings = problem, settings
        self._known: dict[tuple, Evaluation] = {}
        self._kept_noisy: list[torch.Tensor] | None = None

    def __getstate__(self):
        """What is pickled and copied: what was measured, but no network, image or noise that can be made again."""
        again = ("quantizer", "divergence", "_method", "_reward_images", "_fp32_logits")
        return {name: value for name, value in vars(self).items() if name not in again} | {"_kept_noisy": None}

    @cached_property
    def quantizer(self) -> Quantizer:
        """Calibrated at first use."""
        problem = self.problem
        images = problem.calibration_images(self.settings.seed, self.settings.calibration_images)
        return Quantizer(problem.network, problem.layers, images)

    @cached_property
    def rounding(self) -> str:
        """What a reward depends on beside everything else: "exact" where nothing, else the processor's kernels and threads."""
        if self.problem.device.type == "cpu" and self.settings.reward_method == "soft" and self.quantizer.exact():
            return "exact"
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"

    @cached_property
    def divergence(self) -> Divergence:
        """How far a map's predictions are from FP32's, a function."""
        return Divergence(self.problem, self.quantizer, self.settings.seed)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """What few bits cost in each place, measured at first use by :func:`arq_env.sensitivity.forward_passes`, as many
        as about 40 evaluations of ResNet-20 on CIFAR-10 make with the default settings.
        """
        measured, skipped = measure_sensitivities(self.divergence), self.settings.regained_bits
        return {
            (layer, kind): effects[skipped:] + effects[-1:] * skipped if kind == "weight" else effects
            for (layer, kind), effects in measured.items()
        }

    @cached_property
    def reference(self) -> Evaluation:
        """The FP32 network under the same certifier; warns when it never saw noise.

        :raises ArqError: when it is no better than chance under noise, so that there is nothing to compare with
        """
        warn_if_noise_is_new(self.problem)
        evaluation = self._measure_fp32()
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
        key = tuple(bit_widths.items())
        if key not in self._known:
            quantizer = self.quantizer  # calibrated before the clock starts
            self._known[key] = self.measure(lambda: quantizer.quantize(self.regained(bit_widths), integers=True))
        return self._known[key]

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
            return Evaluator(self.problem, replace(fresh, images=min(2 * s.images, left), first=start))
        return Evaluator(self.problem, replace(fresh, images=min(2 * s.images, len(there.train.images)), part="train", first=0))

    def measure(self, build: Callable[[], torch.nn.Module]) -> Evaluation:
        """What the reward certifier says of the network that ``build`` makes, whose making counts to the seconds."""
        (images, labels), s, sigma = self._reward_images, self.settings, self.problem.sigma
        method, entropy = self._method, self._entropy
        start = time.perf_counter()
        with exact_means():
            if s.reward_method == "soft":
                logits = logits_of_copies(build(), self._noisy)
                return self._soft(radius_of_logits(logits, labels, sigma=sigma, entropy=entropy), start)
            counts = {"n0": s.n0, "n": s.n, "alpha": s.alpha, "seed": s.seed}
            table = certify(build(), images, labels, sigma=sigma, **counts, method=method)
        acr, clean, certified = table.acr, table.clean_accuracy, table.certified_accuracy(sigma / 2)
        return Evaluation(acr, clean, certified, time.perf_counter() - start)

    def _soft(self, radius: np.ndarray, start: float) -> Evaluation:
        """An evaluation by soft radii; the ACR's last places, which float64 sums in another order may change, are cut off."""
        acr, half = round(float(np.maximum(radius, 0).mean()), PLACES), self.problem.sigma / 2
        return Evaluation(acr, float((radius > 0).mean()), float((radius >= half).mean()), time.perf_counter() - start)

    def _measure_fp32(self) -> Evaluation:
        if self.settings.reward_method != "soft":
            return self.measure(lambda: self.problem.network)
        start = time.perf_counter()
        (_, labels), sigma = self._reward_images, self.problem.sigma
        measured = self._soft(radius_of_logits(self._fp32_logits, labels, sigma=sigma, entropy=self._entropy), start)
        return replace(measured, acr=round(measured.acr, FP32_PLACES))

    @cached_property
    def _fp32_logits(self) -> torch.Tensor:
        return logits_of_copies(self.problem.network, self._noisy)

    @property
    def _noisy(self) -> Iterable[torch.Tensor]:
        """The noisy reward images, which all networks are asked about: kept where they are not too large, else drawn again."""
        if self._kept_noisy is not None:
            return self._kept_noisy
        s, (images, _) = self.settings, self._reward_images
        copies = noisy_copies(images, sigma=self.problem.sigma, n=s.n, seed=s.seed)
        if images.numel() * s.n > KEPT_VALUES:
            return copies
        self._kept_noisy = list(copies)
        return self._kept_noisy

    @cached_property
    def _method(self) -> Method | None:
        """How class labels are counted; with what the FP32 network predicts, for the methods that compare with it."""
        s = self.settings
        if s.reward_method == "soft":
            return None
        kind = METHODS[s.reward_method]
        if kind in (Incremental, Paired):
            images, _ = self._reward_images
            n = CACHE_FACTOR * s.n
            return kind(cache_predictions(self.problem.network, images, sigma=self.problem.sigma, n0=s.n0, n=n, seed=s.seed))
        return kind() if kind is Sequential else kind(skip_wrong=True)  # what is wrong cannot count

    @cached_property
    def _entropy(self) -> float | None:
        """How unsure the FP32 network is, at which soft radii are compared."""
        s = self.settings
        return round(mean_entropy(self._fp32_logits), FP32_PLACES) if s.reward_method == "soft" else None

    @cached_property
    def _reward_images(self):
        s = self.settings
        if s.part == "train":
            return self.problem.training_images(s.images, s.seed)
        return self.problem.reward_images(s.images, s.first)


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
