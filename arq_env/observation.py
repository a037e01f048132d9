"""What the agent sees of a layer: one row of features in [0, 1]."""

import math

import numpy as np

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap
from arq_env.budget import Budget
from arq_env.layers import Layer

STATIC = (
    "position",
    "depthwise",
    "linear",
    "in_channels",
    "out_channels",
    "kernel",
    "stride",
    "parameters",
    "input_size",
    "macs",
)
DYNAMIC = ("macs_left", "budget", "budget_left", "previous_weight_bits", "previous_activation_bits")
FEATURES = STATIC + DYNAMIC


def static_features(layers: tuple[Layer, ...]) -> np.ndarray:
    """One row a layer: sizes on a log scale, each column scaled to [0, 1] over the layers (0 where all are equal).

    :return: float32 [len(layers), len(STATIC)]
    """
    rows = [
        (
            position,
            layer.depthwise,
            layer.kind == "linear",
            math.log(layer.in_channels),
            math.log(layer.out_channels),
            math.log(layer.kernel),
            layer.stride,
            math.log(layer.parameters),
            math.log(layer.input_size),
            math.log(layer.macs),
        )
        for position, layer in enumerate(layers)
    ]
    return scale_columns(np.array(rows, np.float64)).astype(np.float32)


def scale_columns(table: np.ndarray) -> np.ndarray:
    """Each column scaled to [0, 1]; 0 where all of its values are equal."""
    low, high = table.min(axis=0), table.max(axis=0)
    return (table - low) / np.where(high > low, high - low, 1)


def observe(static: np.ndarray, budget: Budget, chosen: BitWidthMap, previous: Bits) -> np.ndarray:
    """The row for the next layer, of :data:`FEATURES`; after the last step, the last layer's with nothing left to do.

    The three budget features make the decision Markov under a budget: how much work is left, what an even share of
    the whole budget was, and what an even share of the rest is now (both as the square root of bits x bits, over 8).
    """
    step = len(chosen)
    over = step == len(static)
    row = np.empty(len(FEATURES), np.float32)
    row[: len(STATIC)] = static[step - over]
    row[len(STATIC) :] = (
        budget.share_from(step),
        _even_share(budget, {}),
        0.0 if over else _even_share(budget, chosen),
        previous.weight / MAX_BITS,
        previous.activation / MAX_BITS,
    )
    return row


def _even_share(budget: Budget, chosen: BitWidthMap) -> float:
    return math.sqrt(math.prod(budget.even_bits(chosen))) / MAX_BITS
