"""The one door for what a caller gives: numbers, pixels, labels and classifiers, each checked and brought into one form."""

import contextlib
import inspect
import itertools
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from arq_env.support.errors import ArqError, shown

#: How far pixels may be outside of [0, 1]: that much is rounding, and is clipped.
ROUNDING = 1e-6
#: Noise much smaller than this is rounded away in float32, larger noise leaves nothing of an image.
LEAST_SIGMA, MOST_SIGMA = 1e-6, 1e6
#: Far below this SciPy's quantiles fail.
LEAST_ALPHA = 1e-30
#: Most samples that select and that count a class, and the largest seed and label: more is a slip, and would hang.
MOST_N0, MOST_N, MOST_SEED, MOST_LABEL = 10**6, 10**9, 2**63 - 1, 2**31 - 1


def first_line(error: Exception) -> str:
    """What an exception says first, for the middle of a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _number(value) -> Any:
    """The value where it is one finite real number (also NumPy's or a tensor's), else None; truth values are none."""
    if getattr(value, "ndim", None) == 0 and isinstance(value, (np.ndarray, np.generic, torch.Tensor)) and not _is_meta(value):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return value if math.isfinite(float(value)) else None
    except OverflowError:
        return None


def whole(name: str, value, least: int, most: float, *, floats: bool = True) -> int:
    """The argument as an int; a float such as 1e4 counts where it is whole, if ``floats`` do at all.

    :raises ArqError: for anything but a whole number from ``least`` to ``most``
    """
    number = _number(value)
    integral = isinstance(number, numbers.Integral) or floats and number is not None and number == math.floor(number)
    if number is None or not integral or not least <= number <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most:,}"
        raise ArqError(f"{name} is {shown(value)}: give a whole number {limits}")
    return int(number)


def real(name: str, value, holds: Callable[[float], bool], wanted: str) -> float:
    """The argument as a float.

    :raises ArqError: for anything but a finite number for which ``holds``; the message asks for what is ``wanted``
    """
    number = _number(value)
    if number is None or not holds(float(number)):
        raise ArqError(f"{name} is {shown(value)}: give {wanted}")
    return float(number)


def flag(name: str, value) -> bool:
    """The argument as a bool.

    :raises ArqError: for anything but True or False
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ArqError(f"{name} is {shown(value)}: give True or False")
    return bool(value)


def checked_sigma(sigma) -> float:
    """The noise level as a float, or an ArqError."""
    wanted = f"a positive standard deviation from {LEAST_SIGMA:g} to {MOST_SIGMA:g}, in units of pixels in [0, 1]"
    return real("sigma", sigma, lambda value: LEAST_SIGMA <= value <= MOST_SIGMA, wanted)


def checked_alpha(alpha) -> float:
    """The probability of failure as a float, or an ArqError."""
    wanted = f"the probability of failure, in (0, 1) and not below {LEAST_ALPHA:g}"
    return real("alpha", alpha, lambda value: LEAST_ALPHA <= value < 1, wanted)


def function(name: str, value, *arguments: str, **named: str) -> Callable:
    """The argument, or an ArqError where it cannot be called with such arguments."""
    fits = callable(value)
    if fits:
        with contextlib.suppress(ValueError):  # it does not say, such as the built-in map
            try:
                inspect.signature(value).bind(*arguments, **named)
            except TypeError:
                fits = False
    if not fits:
        raise ArqError(f"{name} is {shown(value)}: give a function, to be called as {name}({', '.join((*arguments, *named))})")
    return value


def checked_name(name) -> str:
    """The argument ``name``, or an ArqError where it is no text."""
    if not isinstance(name, str):
        raise ArqError(f"name is {shown(name)}: give text, such as the digest of a model's file")
    return name


def as_array(name: str, values) -> np.ndarray:
    """What NumPy makes of an array, a tensor on any device, or nested lists; the caller's memory where possible.

    :raises ArqError: where that is no array of real numbers or truth values
    """
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().cpu()
            if values.is_floating_point() and values.element_size() < 4:
                values = values.float()  # NumPy has no bfloat16
            values = values.numpy()
        made = np.asarray(values)
    except Exception as error:  # whatever someone else's object raises when it is read
        raise ArqError(f"{name} cannot be read as an array ({first_line(error)}): give a NumPy array or a tensor") from error
    if made.dtype.kind not in "biuf":
        raise ArqError(f"{name} are of type {made.dtype}: give real numbers")
    return made


def reals(name: str, values, low: float, high: float, wanted: str) -> np.ndarray:
    """The argument as a float64 array.

    :raises ArqError: where an entry is outside of [low, high]; the message asks for what is ``wanted``
    """
    made = as_array(name, values).astype(np.float64)
    if not ((made >= low) & (made <= high)).all():  # also for NaN
        raise ArqError(f"{name} is {shown(values)}: give {wanted}")
    return made


def checked_pixels(images) -> np.ndarray:
    """Images as a float32 array [n, ...] in [0, 1]; what is outside by rounding is clipped, in a copy.

    :raises ArqError: for no images, for whole numbers (0 to 255, most likely), and for pixels out of range or NaN
    """
    made = as_array("images", images)
    if made.dtype.kind not in "fb":
        raise ArqError(f"images are {made.dtype}: give floating-point pixels in [0, 1], such as images / 255")
    if made.ndim < 2 or made.size == 0:
        raise ArqError(f"images have shape {made.shape}: give at least one image, as [n, c, h, w]")
    low, high = made.min(), made.max()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # also for NaN
        raise ArqError(f"pixels range from {low:.9g} to {high:.9g}: give images in [0, 1] and let the classifier normalise")
    made = made.astype(np.float32, copy=False)
    return made if low >= 0 and high <= 1 else made.clip(0, 1)


def checked_labels(labels, images: int, *, unknown: bool = True) -> np.ndarray:
    """Labels as int64 [images].

    :param unknown: whether a label may be -1
    :raises ArqError: for another shape, and for anything but whole numbers from 0 (or -1)
    """
    made = as_array("labels", labels)
    if made.shape != (images,):
        raise ArqError(f"there are {images} images and labels of shape {made.shape}: give one label an image")
    if not ((made >= -int(unknown)) & (made <= MOST_LABEL) & (made == np.floor(made))).all():
        raise ArqError("labels must be whole numbers from 0" + (", or -1 where unknown" if unknown else ""))
    return made.astype(np.int64)


def checked_classifier(classifier) -> None:
    """Raise an ArqError unless this is a function, and not a torch module in training mode."""
    function("classifier", classifier, "batch")
    if isinstance(classifier, torch.nn.Module) and any(module.training for module in classifier.modules()):
        raise ArqError(
            "the classifier is in training mode, in which its output depends on the rest of the batch: call eval() first"
        )


def device_of(network: torch.nn.Module) -> torch.device:
    """Where a network's first tensor is; the CPU for a network without any."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _is_meta(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta
