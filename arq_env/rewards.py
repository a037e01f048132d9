"""How the reward is measured: its settings, and the ways there are, one class each.

A new way is one more class, and one more entry in ``REWARDS``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from arq_env.bitwidths import MAX_BITS, MIN_BITS
from arq_env.certification import Cohen, Incremental, Method, Paired, Randomized, Sequential, cache_predictions, certify
from arq_env.certification.inputs import checked_alpha, whole
from arq_env.certification.soft import IMAGES_AT_ONCE, logits_of_copies, mean_entropy, noisy_copies, radius_of_logits
from arq_env.problem import CALIBRATION_IMAGES, Problem
from arq_env.support.errors import ArqError

#: Samples of the FP32 network for each one that an incremental reward replays: a one-off cost, which makes its bound tight.
CACHE_FACTOR = 16
#: Most values of noisy images that are kept from evaluation to evaluation (256 MiB).
KEPT_VALUES = 2**26
#: Decimal places of an ACR that count; and of FP32's figures, whose convolutions every processor rounds in its own way.
PLACES, FP32_PLACES = 9, 5
#: Noise samples an image that a reward may ask for: a hundred times those of the field's largest certificates.
MOST_SAMPLES = 10_000_000


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
        (:func:`arq_env.finishing.finish`) wins about that back, and nothing of what activations lose. 1 ranks maps
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
        if not isinstance(self.reward_method, str) or self.reward_method not in REWARDS:
            raise ArqError(f"there is no reward method {self.reward_method!r}: choose one of {', '.join(REWARDS)}")
        for name, low, high in (
            ("images", 1, math.inf),
            ("n0", 1, MOST_SAMPLES),
            ("n", 1, MOST_SAMPLES),
            ("seed", 0, 2**32 - 1),
            ("first", 0, math.inf),
            ("regained_bits", 0, MAX_BITS - MIN_BITS),
            ("calibration_images", 2, math.inf),
        ):
            object.__setattr__(self, name, whole(name, getattr(self, name), low, high, floats=False))
        if not isinstance(self.part, str) or self.part not in ("reward", "train"):
            raise ArqError(f"part is {self.part!r}: give 'reward' or 'train'")
        object.__setattr__(self, "alpha", checked_alpha(self.alpha))

    @property
    def forward_passes(self) -> int:
        """Noisy images that an evaluation sends through the quantized network, at most, calibration included."""
        return self.calibration_images + self.images * REWARDS[self.reward_method].samples(self)


def settings_for(problem: Problem, **settings: Any) -> CertifierSettings:
    """Settings with images that there are: by default all of a smaller reward part, and of large images fewer.

    At most 2^26 pixel values of reward images (all noise then stays in memory) and a quarter of that for calibration: 445 and 111
    images of 3x224x224, and up to 104x104 no fewer than of small ones. A reward from fewer images holds more noise: with a quarter
    of them twice as much.

    :param settings: fields of :class:`CertifierSettings`, taken as they are
    """
    there, values = problem.dataset.counts, math.prod(problem.dataset.image_shape)
    default = CertifierSettings()
    images = min(default.images, there["reward"], max(1, KEPT_VALUES // values))
    calibration = min(default.calibration_images, max(2, KEPT_VALUES // 4 // values))
    return CertifierSettings(**{"images": images, "calibration_images": calibration} | settings)


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


class Figures(NamedTuple):
    """What a reward says of a network.

    :param acr: average certified radius (of "soft": as estimated), in units of pixels in [0, 1]
    :param clean_accuracy: of the smoothed classifier
    :param certified_accuracy: at radius sigma / 2
    """

    acr: float
    clean_accuracy: float
    certified_accuracy: float


class Reward(ABC):
    """How networks are judged on one problem's reward images, all on the same noise.

    :cvar exact: whether a network whose arithmetic is exact gets the same figures on every processor
    """

    exact: ClassVar[bool] = False
    #: What can be made again, and is neither pickled nor copied.
    again: ClassVar[tuple[str, ...]] = ("images",)

    def __init__(self, problem: Problem, settings: CertifierSettings):
        self.problem, self.settings = problem, settings

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in self.again}

    @staticmethod
    @abstractmethod
    def samples(settings: CertifierSettings) -> int:
        """Forward passes for each image, at most."""

    @abstractmethod
    def prepare(self) -> None:
        """Measure once, of the FP32 network, what the others are compared with."""

    @abstractmethod
    def judge(self, network: torch.nn.Module) -> Figures:
        """The figures of one network."""

    def reference(self) -> Figures:
        """The FP32 network's figures."""
        return self.judge(self.problem.network)

    @cached_property
    def images(self) -> tuple[torch.Tensor, np.ndarray]:
        """float32 [n, c, h, w] in [0, 1], and labels [n]."""
        s = self.settings
        if s.part == "train":
            return self.problem.training_images(s.images, s.seed)
        return self.problem.reward_images(s.images, s.first)


class Soft(Reward):
    """The soft smoothed classifier's radius (:func:`arq_env.certification.soft_radius`), at FP32's mean entropy."""

    exact = True
    again = ("images", "_kept_noisy")

    @staticmethod
    def samples(settings: CertifierSettings) -> int:
        return settings.n

    def prepare(self) -> None:
        _ = self._fp32

    def judge(self, network: torch.nn.Module) -> Figures:
        return self.figures(self.logits(network))

    @property
    def most_parts(self) -> int:
        """Into how many parts the images can be divided."""
        return -(-self.settings.images // IMAGES_AT_ONCE)

    def logits(self, network: torch.nn.Module, part: int = 0, parts: int = 1) -> torch.Tensor:
        """What a network says of one of so many parts of the noisy images, float64 [images of the part, n, classes]."""
        first, end = self.most_parts * part // parts, self.most_parts * (part + 1) // parts
        return logits_of_copies(network, islice(self._noisy, first, end))

    def figures(self, logits: torch.Tensor) -> Figures:
        """The figures of a network by its logits of all images."""
        entropy, _ = self._fp32
        return self._figures(logits, entropy)

    def reference(self) -> Figures:
        return self._fp32[1]

    @cached_property
    def _fp32(self) -> tuple[float, Figures]:
        """How unsure the FP32 network is, and its figures."""
        logits = logits_of_copies(self.problem.network, self._noisy)
        entropy = round(mean_entropy(logits), FP32_PLACES)
        figures = self._figures(logits, entropy)
        return entropy, figures._replace(acr=round(figures.acr, FP32_PLACES))

    def _figures(self, logits: torch.Tensor, entropy: float) -> Figures:
        """The ACR's last places, which float64 sums in another order may change, are cut off."""
        (_, labels), sigma = self.images, self.problem.sigma
        radius = radius_of_logits(logits, labels, sigma=sigma, entropy=entropy)
        acr = round(float(np.maximum(radius, 0).mean()), PLACES)
        return Figures(acr, float((radius > 0).mean()), float((radius >= sigma / 2).mean()))

    @property
    def _noisy(self) -> Iterable[torch.Tensor]:
        """The noisy reward images, which all networks are asked about: kept where they are not too large, else drawn again."""
        s, (images, _) = self.settings, self.images
        if images.numel() * s.n > KEPT_VALUES:
            return noisy_copies(images, sigma=self.problem.sigma, n=s.n, seed=s.seed)
        return self._kept_noisy

    @cached_property
    def _kept_noisy(self) -> list[torch.Tensor]:
        s, (images, _) = self.settings, self.images
        return list(noisy_copies(images, sigma=self.problem.sigma, n=s.n, seed=s.seed))


class Certified(Reward):
    """Certified radii, by a method of :func:`arq_env.certification.certify`."""

    again = ("images", "_method")

    @staticmethod
    def samples(settings: CertifierSettings) -> int:
        return settings.n0 + settings.n

    def prepare(self) -> None:
        _ = self.images, self._method

    def judge(self, network: torch.nn.Module) -> Figures:
        (images, labels), s, sigma = self.images, self.settings, self.problem.sigma
        table = certify(network, images, labels, sigma=sigma, n0=s.n0, n=s.n, alpha=s.alpha, seed=s.seed, method=self._method)
        return Figures(table.acr, table.clean_accuracy, table.certified_accuracy(sigma / 2))

    @cached_property
    def _method(self) -> Method:
        return COUNTING[self.settings.reward_method]


class Replayed(Certified):
    """The difference to the FP32 network, whose predictions are drawn once."""

    @cached_property
    def _method(self) -> Method:
        s, (images, _) = self.settings, self.images
        n = CACHE_FACTOR * s.n
        cache = cache_predictions(self.problem.network, images, sigma=self.problem.sigma, n0=s.n0, n=n, seed=s.seed)
        return REPLAYING[s.reward_method](cache)


#: By the name in :class:`CertifierSettings`: methods that count class labels (what is wrong cannot count), and that need a cache.
COUNTING = {method.name: method for method in (Cohen(skip_wrong=True), Randomized(skip_wrong=True), Sequential())}
REPLAYING: dict[str, type[Incremental] | type[Paired]] = {"incremental": Incremental, "paired": Paired}
REWARDS: dict[str, type[Reward]] = {"soft": Soft, **dict.fromkeys(COUNTING, Certified), **dict.fromkeys(REPLAYING, Replayed)}
