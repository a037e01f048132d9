"""What decides the weights of a training, apart from what imports torch."""

import math
from dataclasses import dataclass, replace

from arq_env.support.errors import ArqError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, given network, data and the parts that memory divides a batch into.

    :param cycles: how often the rate rises to its peak and falls to zero, each time over ``epochs`` / ``cycles`` epochs (warm
        restarts, Loshchilov and Hutter 2017)
    :param precision: arithmetic of the training passes, "fp32" or "bf16"; weights stay float32
    :param optimizer: "sgd" (Nesterov) or "adamw", which needs fewer steps under few bits
    :param noises: noisy copies of each image in a step
    :param consistency: weight lambda of the copies' divergence from their mean prediction
    :param entropy: weight eta of the mean prediction's entropy
    :param distillation: share of the teacher's predictions in the cross-entropy, against the labels
    :param images: training images an epoch, drawn anew for each; 0 for all of them
    :param start: SHA-256 of the checkpoint it starts from; empty for weights drawn from ``seed``
    """

    sigma: float = 0.5
    epochs: int = 80
    batch: int = 128
    peak_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 2e-4
    seed: int = 0
    precision: str = "fp32"
    cycles: int = 1
    noises: int = 1
    consistency: float = 0.0
    entropy: float = 0.0
    distillation: float = 0.0
    images: int = 0
    optimizer: str = "sgd"
    start: str = ""

    def __post_init__(self):
        for name, low in (("epochs", 1), ("batch", 1), ("noises", 1), ("cycles", 1), ("seed", 0), ("images", 0)):
            if type(value := getattr(self, name)) is not int or value < low:
                raise ArqError(f"{name} is {value!r}: give a whole number of at least {low}")
        for name in ("sigma", "peak_rate", "weight_decay", "consistency", "entropy", "distillation", "momentum"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ArqError(f"{name} is {value!r}: give a number that is not negative")
        for name in ("sigma", "peak_rate"):
            if getattr(self, name) == 0:
                raise ArqError(f"{name} is 0: give a positive number")
        if self.momentum >= 1:
            raise ArqError(f"momentum is {self.momentum}: give a number below 1")
        if self.optimizer not in ("sgd", "adamw"):
            raise ArqError(f"there is no optimizer {self.optimizer!r}: choose sgd or adamw")
        if self.precision not in ("fp32", "bf16"):
            raise ArqError(f"there is no precision {self.precision!r}: choose fp32 or bf16")
        if self.distillation > 1:
            raise ArqError(f"distillation is {self.distillation}: give a share from 0 to 1")
        if self.epochs % self.cycles:
            raise ArqError(f"cycles is {self.cycles}: give a divisor of the {self.epochs} epochs")


def training_method(training: str, sigma: float) -> dict:
    """The fields of a Recipe that make up a training method, with its authors' weights.

    :param training: "gaussian" (Cohen et al. 2019) or "consistency" (Jeong and Shin 2020, section 4 and appendix)
    :raises ArqError: for another name
    """
    if training == "gaussian":
        return {"noises": 1, "consistency": 0.0, "entropy": 0.0}
    if training == "consistency":
        return {"noises": 2, "consistency": 20.0 if sigma <= 0.25 else 10.0, "entropy": 0.5}
    raise ArqError(f"there is no training {training!r}: choose gaussian or consistency")


def finetuning_recipe(sigma: float, **changes) -> Recipe:
    """The recipe of the reported figures: a short cycle that distils the base network on noisy images, and nothing else.

    The base network knows what its training under noise has taught it; labels and a consistency loss pull the quantized network
    elsewhere.
    """
    default = Recipe(sigma, epochs=3, batch=128, optimizer="adamw", peak_rate=0.001, weight_decay=1e-4, distillation=1.0)
    return replace(default, **changes)
