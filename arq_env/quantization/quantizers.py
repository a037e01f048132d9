"""Uniform quantizers and the step sizes that minimise their mean squared error."""

from collections.abc import Callable

import torch

#: Steps tried, as fractions of the step that just reaches the largest magnitude.
WEIGHT_FRACTIONS = torch.linspace(0.1, 1.0, 91)
ACTIVATION_FRACTIONS = torch.linspace(0.02, 1.0, 99)


def integer_range(bits: int, *, signed: bool) -> tuple[int, int]:
    """The integers an activation is rounded to. A signed range is symmetric, so at 2 bits it is ternary.

    >>> integer_range(4, signed=True), integer_range(2, signed=True), integer_range(4, signed=False)
    ((-7, 7), (-1, 1), (0, 15))
    """
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def weight_range(bits: int) -> tuple[int, int, int]:
    """Least and greatest of the integers a weight is rounded to, and their distance: symmetric.

    With zero among them a symmetric range leaves one of the 2^bits codes unused. That is little at 8 bits and a quarter at 2,
    where therefore the four odd numbers stand: for normally distributed weights a third less squared error than ternary ones.

    >>> weight_range(8), weight_range(3), weight_range(2)
    ((-127, 127, 1), (-3, 3, 1), (-3, 3, 2))
    """
    return (-3, 3, 2) if bits == 2 else (*integer_range(bits, signed=True), 1)


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

    :param weight: [out, ...]
    :return: [out], positive

    >>> weight_steps(torch.tensor([[3.0, -1.0, 1.0], [0.3, 0.1, -0.1]]), 2)  # exact
    tensor([1.0000, 0.1000])
    """
    levels = weight_range(bits)
    rows = weight.detach().flatten(1)
    return _least_error(rows, rows.abs().amax(1) / levels[1], WEIGHT_FRACTIONS, levels)


def activation_step(samples: torch.Tensor, bits: int) -> torch.Tensor:
    """The one step with the least squared error on sampled activations; signed only where some are negative.

    :param samples: [n]
    :return: scalar, positive

    >>> activation_step(torch.tensor([0.0, 2.0, 4.0, 6.0]), 2), activation_step(torch.tensor([-2.0, 0.0, 2.0]), 2)
    (tensor(2.), tensor(2.))
    """
    levels = integer_range(bits, signed=is_signed(samples))
    rows = samples.detach().flatten()[None]
    return _least_error(rows, rows.abs().amax(1) / levels[1], ACTIVATION_FRACTIONS, levels)[0]


def is_signed(samples: torch.Tensor) -> bool:
    """Whether activations take negative values, so that they need a signed range."""
    return bool(samples.min() < 0)


def _least_error(rows, largest_step, fractions, levels):
    largest_step = largest_step.clamp_min(torch.finfo(rows.dtype).tiny * 1e6)  # a channel of zeros keeps a usable step
    best = largest_step.clone()
    least = torch.full_like(best, torch.inf)
    for fraction in fractions:
        step = largest_step * fraction
        column = step[:, None]
        error = (to_integers(rows, column, *levels) * column - rows).square_().sum(1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best
