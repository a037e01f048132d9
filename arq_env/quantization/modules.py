"""Conv2d and Linear with quantized weights and quantized input activations (fake quantization).

Two forms of the same function: quantized layers, for deployment and certification, and learnable layers, for fine-tuning.
"""

import math

import torch
from torch import nn

from arq_env.errors import ArqError
from arq_env.quantization.quantizers import integer_range, nearest_level, to_integers, weight_range


class QuantizedLayer:
    """What both kinds share: the layer computes on integers and scales once.

    ``name`` is what the network calls the layer. ``weight`` holds the quantized weights (integer times the channel's step),
    ``activation_step`` the step of the input. The forward pass rounds the input to integers and multiplies by
    ``weight * activation_step``, which is the same function as rounding to multiples of the step, with one pass over the
    activations less.
    """

    def set_bits(self, weight, weight_step, weight_bits: int, activation_step, activation_bits: int, *, signed: bool) -> None:
        """Quantize the input with this step and the float ``weight`` [out, ...] with ``weight_step`` [out]."""
        step = weight_step.view(-1, *[1] * (weight.dim() - 1))
        quantized = to_integers(weight, step, *weight_range(weight_bits)) * step
        self.set_levels(quantized, weight_bits, activation_step, activation_bits, signed=signed)

    def set_levels(self, weight, weight_bits: int, activation_step, activation_bits: int, *, signed: bool) -> None:
        """Take over weights that are quantized already."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("activation_step", activation_step.detach().clone())
        self.register_buffer(
            "scaled_weight", (weight * activation_step).contiguous(memory_format=_layout(weight)), persistent=False
        )
        self.weight_bits, self.activation_bits, self.signed = weight_bits, activation_bits, signed
        self.low, self.high = integer_range(activation_bits, signed=signed)

    def _integers(self, x: torch.Tensor) -> torch.Tensor:
        """The input as integers."""
        if x.dtype != self.scaled_weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ArqError(
                f"layer {self.name!r} was given {x.dtype} and computes in {self.scaled_weight.dtype}: convert the images, not the "
                "quantized network"
            )
        return to_integers(x, self.activation_step, self.low, self.high)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution on quantized weights and activations; padding stays exact since 0 is a quantization level."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(self._integers(x), self.scaled_weight, self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Linear layer on quantized weights and activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(self._integers(x), self.scaled_weight, self.bias)


class LearnableLayer:
    """A layer whose weights and step sizes are learned (LSQ, Esser et al., ICLR 2020), to become a quantized one.

    ``weight`` holds float weights, ``weight_log_step`` [out] and ``activation_log_step`` [] the logarithms of the steps; all are
    parameters. Logarithms, since Adam moves every parameter by about the learning rate whatever its size: an 8-bit step is a
    hundredth of a 2-bit one, and has to be learned as finely for its size.
    """

    def set_bits(self, weight, weight_step, weight_bits: int, activation_step, activation_bits: int, *, signed: bool) -> None:
        """Start from these weights and steps; the arguments are those of a quantized layer."""
        self.weight = nn.Parameter(weight.detach().clone(memory_format=_layout(weight)))
        self.weight_log_step = nn.Parameter(weight_step.detach().log())
        self.activation_log_step = nn.Parameter(activation_step.detach().log())
        self.weight_bits, self.activation_bits, self.signed = weight_bits, activation_bits, signed

    @property
    def weight_step(self) -> torch.Tensor:
        """Step sizes of the weights, [out]."""
        return self.weight_log_step.exp()

    @property
    def activation_step(self) -> torch.Tensor:
        """Step size of the input, []."""
        return self.activation_log_step.exp()

    def _quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight, both rounded to their levels."""
        step = self.weight_step.view(-1, *[1] * (self.weight.dim() - 1))
        weight = learned_rounding(self.weight, step, *weight_range(self.weight_bits), elements=self.weight[0].numel())
        levels = integer_range(self.activation_bits, signed=self.signed)
        return learned_rounding(x, self.activation_step, *levels, elements=x[0].numel()), weight

    def frozen(self) -> QuantizedLayer:
        """The quantized layer with this layer's weights and steps."""
        new = _like(self, QuantizedConv2d if isinstance(self, nn.Conv2d) else QuantizedLinear)
        new.name = self.name
        new.set_bits(
            self.weight.detach(),
            self.weight_step.detach(),
            self.weight_bits,
            self.activation_step.detach(),
            self.activation_bits,
            signed=self.signed,
        )
        return new


class LearnableConv2d(LearnableLayer, nn.Conv2d):
    """Convolution whose weights and step sizes are learned under quantization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(*self._quantized(x), self.bias)


class LearnableLinear(LearnableLayer, nn.Linear):
    """Linear layer whose weights and step sizes are learned under quantization."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(*self._quantized(x), self.bias)


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
    :param elements: values that share a step; the step's gradient is scaled by 1 / sqrt(elements x high), LSQ section 2.2

    >>> learned_rounding(torch.tensor([-0.3, 0.2, 0.9]), torch.tensor(0.5), -1, 1, elements=3)
    tensor([-0.5000,  0.0000,  0.5000])
    """
    scale = 1 / math.sqrt(elements * high)
    step = (step - step * scale).detach() + step * scale
    return nearest_level((x / step).clamp(low, high), low, distance, _Round.apply) * step


def quantized_like(module: nn.Module, name: str, *, learnable: bool = False) -> QuantizedLayer | LearnableLayer:
    """A quantized module of the same geometry, bias and training mode, whose bits are still to be set."""
    if isinstance(module, nn.Conv2d):
        new = _like(module, LearnableConv2d if learnable else QuantizedConv2d)
    else:
        new = _like(module, LearnableLinear if learnable else QuantizedLinear)
    new.name = name
    return new


def _like(module: nn.Module, kind: type) -> nn.Module:
    """An empty module of this kind with the geometry, bias and training mode of another.

    It is made on the meta device, where no initial weights are drawn: they would advance torch's global generator.
    """
    if isinstance(module, nn.Conv2d):
        new = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
        )
    else:
        new = kind(module.in_features, module.out_features, module.bias is not None, device="meta")
    new.bias = module.bias
    return new.train(module.training)


def replace_module(network: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one with this name."""
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def _layout(weight: torch.Tensor):
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format
