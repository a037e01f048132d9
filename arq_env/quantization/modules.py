"""Layers with quantized weights and quantized input activations (fake quantization).

Two forms of the same function: quantized layers, for deployment and certification, and learnable layers, for fine-tuning. What is
particular to a class of modules stands in :mod:`arq_env.kinds`.
"""

import math
from typing import Any

import torch
from torch import nn

from arq_env.kinds import Kind, kind_of
from arq_env.layers import Layer
from arq_env.quantization.quantizers import highest, nearest_level, to_integers, weight_range
from arq_env.support.errors import ArqError


class _Replacement(nn.Module):
    """A module with the geometry and the bias of another, whose weight and bits are still to be set.

    :param module: of a class in :data:`arq_env.kinds.KINDS`
    :param name: what the network calls it
    """

    kind: type[Kind]

    def __init__(self, module: nn.Module, name: str):
        super().__init__()
        self.kind, self.name = _kind(module), name
        for attribute in ("groups", *self.kind.geometry):
            if hasattr(module, attribute):
                setattr(self, attribute, getattr(module, attribute))
        bias: Any = module.bias
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        self.train(module.training)

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer as [out, everything else]."""
        return self.kind.by_channel(weight, getattr(self, "groups", 1))

    def _from_rows(self, rows: torch.Tensor, shape) -> torch.Tensor:
        return self.kind.from_channels(rows, shape, getattr(self, "groups", 1))

    def extra_repr(self) -> str:
        own = [f"{name}={getattr(self, name)}" for name in self.kind.geometry if not name.startswith("_")]
        bits = [f"{name}={getattr(self, name, None)}" for name in ("weight_bits", "activation_bits", "lowest")]
        weight: Any = self.weight
        return ", ".join([self.kind.__name__, str(tuple(weight.shape)), *own, *bits])


class QuantizedLayer(_Replacement):
    """A layer that computes on integers and scales once.

    ``codes`` (int8) holds the integers that its weights are rounded to, ``weight_step`` [out] and ``activation_step`` [] the
    steps. The forward pass rounds the input to integers, too, and multiplies integers with integers: their sums are exact, in
    whatever order a processor adds them, as long as they stay below 2^24. What follows is one product and one sum a value, rounded
    alike everywhere.
    Zero is a level of activations, so padding stays exact.
    """

    codes: torch.Tensor
    weight_step: torch.Tensor
    activation_step: torch.Tensor

    def set_bits(self, weight, weight_step, weight_bits: int, activation_step, activation_bits: int, *, lowest: int) -> None:
        """Quantize the input with this step, and the float ``weight`` with ``weight_step`` [out].

        :param lowest: the least of the 2^bits integers (2^bits - 1 where they are symmetric) that the input is rounded to
        """
        codes = to_integers(self.rows(weight), weight_step[:, None], *weight_range(weight_bits))
        self.set_codes(
            self._from_rows(codes, weight.shape), weight_step, weight_bits, activation_step, activation_bits, lowest=lowest
        )

    def set_codes(self, codes, weight_step, weight_bits: int, activation_step, activation_bits: int, *, lowest: int) -> None:
        """Take over weights that are integers already."""
        self.register_buffer("codes", codes.to(torch.int8).contiguous(memory_format=_layout(codes)))
        self.register_buffer("weight_step", weight_step.detach().clone())
        self.register_buffer("activation_step", activation_step.detach().clone())
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.lowest, self.highest = lowest, highest(activation_bits, lowest)

    @property
    def weight(self) -> torch.Tensor:
        """The quantized weights: integer times the channel's step."""
        return self._from_rows(self.rows(self.codes) * self.weight_step[:, None], self.codes.shape)

    def largest_sum(self) -> int:
        """No sum of products of the layer's integers is larger; below 2^24 float32 holds them exactly."""
        return int(self.rows(self.codes.int()).abs().sum(1).max()) * max(self.highest, -self.lowest)

    def integers(self, input: torch.Tensor) -> torch.Tensor:
        """The input as integers."""
        if input.dtype != self.activation_step.dtype and not torch.is_autocast_enabled(input.device.type):
            raise ArqError(
                f"layer {self.name!r} was given {input.dtype} and computes in {self.activation_step.dtype}: convert the images, "
                "not the quantized network"
            )
        return to_integers(input, self.activation_step, self.lowest, self.highest)

    def scaled(self, sums: torch.Tensor) -> torch.Tensor:
        """The layer's output from its sums of integers, in place."""
        sums.mul_(self.kind.along_channels(self.weight_step * self.activation_step, sums))
        return sums if self.bias is None else sums.add_(self.kind.along_channels(self.bias, sums))

    def forward(self, input: torch.Tensor, *more) -> torch.Tensor:
        """The layer's operation on quantized weights and the quantized input."""
        integers = self.integers(input)
        return self.scaled(self.kind.run(self, integers, self.codes.to(integers.dtype), None, *more))


class UnroundedLayer(_Replacement):
    """What a quantized layer computes with its rounding left out: for a check of everything else about the conversion."""

    def set_weight(self, weight: torch.Tensor) -> None:
        """Take over the float weight, out of reach of whoever reads ``weight`` past the forward pass."""
        self.register_buffer("unrounded", weight.detach())
        self.weight = nn.Parameter(torch.full_like(weight, torch.nan), requires_grad=False)

    def forward(self, input: torch.Tensor, *more) -> torch.Tensor:
        """The layer's operation."""
        return self.kind.run(self, input, self.unrounded, self.bias, *more)


class LearnableLayer(_Replacement):
    """A layer whose weights and step sizes are learned (LSQ, Esser et al., ICLR 2020), to become a quantized one.

    ``weight`` holds float weights, ``weight_log_step`` [out] and ``activation_log_step`` [] the logarithms of the steps; all are
    parameters. Logarithms, since Adam moves every parameter by about the learning rate whatever its size: an 8-bit step is a
    hundredth of a 2-bit one, and has to be learned as finely for its size.

    :param layer: as :func:`arq_env.layers.find_layers` describes it
    """

    def __init__(self, module: nn.Module, layer: Layer):
        super().__init__(module, layer.name)
        self.elements = layer.in_channels * layer.input_size

    def set_bits(self, weight, weight_step, weight_bits: int, activation_step, activation_bits: int, *, lowest: int) -> None:
        """Start from these weights and steps; the arguments are those of a quantized layer."""
        self.weight = nn.Parameter(weight.detach().clone(memory_format=_layout(weight)))
        self.weight_log_step = nn.Parameter(weight_step.detach().log())
        self.activation_log_step = nn.Parameter(activation_step.detach().log())
        self.weight_bits, self.activation_bits, self.lowest = weight_bits, activation_bits, lowest

    @property
    def weight_step(self) -> torch.Tensor:
        """Step sizes of the weights, [out]."""
        return self.weight_log_step.exp()

    @property
    def activation_step(self) -> torch.Tensor:
        """Step size of the input, []."""
        return self.activation_log_step.exp()

    def forward(self, input: torch.Tensor, *more) -> torch.Tensor:
        """The layer's operation on weights and input that are both rounded to their levels, learnably."""
        rows = self.rows(self.weight)
        rounded = learned_rounding(rows, self.weight_step[:, None], *weight_range(self.weight_bits), elements=rows.shape[1])
        levels = self.lowest, highest(self.activation_bits, self.lowest)
        integers = learned_rounding(input, self.activation_step, *levels, elements=self.elements)
        return self.kind.run(self, integers, self._from_rows(rounded, self.weight.shape), self.bias, *more)

    def frozen(self) -> QuantizedLayer:
        """The quantized layer with this layer's weights and steps."""
        new = QuantizedLayer(self, self.name)
        new.set_bits(
            self.weight.detach(),
            self.weight_step.detach(),
            self.weight_bits,
            self.activation_step.detach(),
            self.activation_bits,
            lowest=self.lowest,
        )
        return new


class _Round(torch.autograd.Function):
    """Rounding, with the identity's gradient (straight-through)."""

    @staticmethod
    def forward(context, x):
        return x.round()

    @staticmethod
    def backward(context, gradient):
        return gradient


def learned_rounding(x: torch.Tensor, step: torch.Tensor, low: int, high: int, distance: int = 1, *, elements: int) -> torch.Tensor:
    """Round to multiples of ``step`` so that both ``x`` and ``step`` learn (LSQ, equations 1 to 3).

    :param low, high, distance: the integers to round to, as for :func:`arq_env.quantization.quantizers.to_integers`
    :param elements: values that share a step; the step's gradient is scaled by 1 / sqrt(elements x highest), LSQ section 2.2

    >>> learned_rounding(torch.tensor([-0.3, 0.2, 0.9]), torch.tensor(0.5), -1, 1, elements=3)
    tensor([-0.5000,  0.0000,  0.5000])
    """
    scale = 1 / math.sqrt(elements * max(high, -low))
    step = (step - step * scale).detach() + step * scale
    return nearest_level((x / step).clamp(low, high), low, distance, _Round.apply) * step


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one with this name, wherever else the network holds it."""
    old = network.get_submodule(name)
    for parent in list(network.modules()):
        for child, there in parent._modules.items():  # named_children() leaves a second name out
            if there is old:
                setattr(parent, child, module)


def _kind(module: nn.Module) -> type[Kind]:
    kind = module.kind if isinstance(module, _Replacement) else kind_of(module)
    if kind is None:
        raise ArqError(f"a {type(module).__name__} cannot be quantized: find_layers says which modules can")
    return kind


def _layout(weight: torch.Tensor):
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format
