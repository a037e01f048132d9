"""Uniform quantizers and the step sizes that minimise their mean squared error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

#: Steps tried for weights, as fractions of the step that just reaches a channel's largest magnitude.
#: Python divides alike everywhere, torch.linspace does not.
WEIGHT_FRACTIONS = torch.tensor([percent / 100 for percent in range(100, 9, -1)] + [0.05, 0.025, 0.0125, 0.00625])
#: Steps tried for activations are powers of two and so many between each and the next: what is sampled differs from machine to
#: machine in its last places, the steps should not. They fall by so many powers of two from the one that clips nothing.
GRID, FALL = 32, 9


def weight_range(bits: int) -> tuple[int, int, int]:
    """Least and greatest of the integers a weight is rounded to, and their distance: symmetric.

    With zero among them a symmetric range leaves one of the 2^bits codes unused. That is little at 8 bits and a quarter at 2,
    where therefore the four odd numbers stand: for normally distributed weights a third less squared error than ternary ones.

    >>> weight_range(8), weight_range(3), weight_range(2)
    ((-127, 127, 1), (-3, 3, 1), (-3, 3, 2))
    """
    return (-3, 3, 2) if bits == 2 else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 1)


def highest(bits: int, lowest: int) -> int:
    """The greatest integer that an activation is rounded to, given the least: 2^bits integers, one less where symmetric.

    >>> highest(4, 0), highest(4, -2), highest(4, -7), highest(2, -1)
    (15, 13, 7, 1)
    """
    symmetric = 2 ** (bits - 1) - 1
    return symmetric if lowest == -symmetric else lowest + 2**bits - 1


def lowest_levels(bits: int) -> list[int]:
    """The least integers that are tried for activations with a negative part: symmetric, and ever smaller parts of the range.

    >>> lowest_levels(2), lowest_levels(4)
    ([-1, -2, -3], [-7, -1, -2, -4, -8, -15])
    """
    parts = [-(2**part) for part in range(bits)] + [1 - 2**bits]
    return list(dict.fromkeys([1 - 2 ** (bits - 1), *parts]))


def to_integers(x: torch.Tensor, step: torch.Tensor, low: int, high: int, distance: int = 1) -> torch.Tensor:
    """Nearest of the integers low, low + distance, ... high, to ``x`` in units of ``step`` (ties as torch rounds).

    >>> to_integers(torch.tensor([-0.3, 0.24, 0.26, 9.0]), torch.tensor(0.5), 0, 3)
    tensor([0., 0., 1., 3.])
    >>> to_integers(torch.tensor([-9.0, -0.9, 0.2, 1.1]), torch.tensor(0.5), *weight_range(2))
    tensor([-3., -1.,  1.,  3.])
    """
    return nearest_level((x / step).clamp_(low, high), low, distance, torch.Tensor.round_)


def nearest_level(scaled: torch.Tensor, low: int, distance: int, rounding: Callable) -> torch.Tensor:
    """``rounding`` on the grid low, low + distance, ...: every quantizer, fixed or learned, goes through here."""
    return rounding(scaled) if distance == 1 else rounding((scaled - low) / distance) * distance + low


def weight_steps(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Step of each output channel with the least squared error on the weights themselves.

    A channel that is nothing beside the others, such as a pruned one, gets the step of one a millionth of their size: much smaller
    steps cannot be learned in float32.

    :param weight: [out, ...]
    :return: [out], positive

    >>> weight_steps(torch.tensor([[3.0, -1.0, 1.0], [0.3, 0.1, -0.1]]), 2)  # exact
    tensor([1.0000, 0.1000])
    """
    levels = weight_range(bits)
    rows = weight.detach().flatten(1)
    largest = rows.abs().amax(1)
    largest = largest.clamp_min(1e-6 * float(largest.max()) or 1.0)
    scale = torch.exp2(torch.floor(torch.log2(largest)))  # a power of two rounds nothing; squares of very small numbers vanish
    steps = (largest / scale / levels[1] * fraction for fraction in WEIGHT_FRACTIONS)
    return _least_error(rows / scale[:, None], steps, levels)[0] * scale


class ActivationLevels(NamedTuple):
    """``step``: scalar tensor, positive; ``lowest``: the least integer that activations are rounded to, see :func:`highest`."""

    step: torch.Tensor
    lowest: int


def activation_levels(samples: torch.Tensor, bits: int, weights: torch.Tensor | None = None) -> ActivationLevels:
    """The step and the range of integers with the least squared error on sampled activations.

    Without negative samples the range starts at 0. With some it is symmetric, or starts at whichever negative integer is best:
    for the small negative part that smooth activation functions have, symmetric levels would waste nearly half of the codes.

    :param samples: [n]
    :param weights: [n], how many activations each sample stands for; alike, if not given

    >>> activation_levels(torch.tensor([0.0, 2.0, 4.0, 6.0]), 2), activation_levels(torch.tensor([-2.0, 0.0, 2.0]), 2).lowest
    (ActivationLevels(step=tensor(2.), lowest=0), -1)
    """
    rows = samples.detach().flatten()[None]
    found: list[tuple[float, int, ActivationLevels]] = []
    for lowest in lowest_levels(bits) if float(rows.min()) < 0 else [0]:
        levels = lowest, highest(bits, lowest), 1
        clips_nothing = max(float(rows.max()) / max(levels[1], 1), float(rows.min()) / min(lowest, -1)) or 1.0
        first = math.ceil(GRID * math.log2(clips_nothing))
        steps = (2.0 ** (power / GRID) for power in range(first, first - FALL * GRID, -1))
        step, error = _least_error(rows, (rows.new_tensor([step]) for step in steps), levels, weights)
        found.append((float(error), len(found), ActivationLevels(step[0], lowest)))
    return min(found)[-1]


def _least_error(rows, steps, levels, weights=None):
    """The best of some steps [rows] for each row, the first of equals, and its squared error, summed in float64."""
    best = least = None
    for step in steps:
        column = step[:, None]
        squares = (to_integers(rows, column, *levels) * column - rows).square_()
        error = (squares if weights is None else squares.mul_(weights)).sum(1, dtype=torch.float64)
        if best is None:
            best, least = step, error
        else:
            better = error < least
            best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best, least
