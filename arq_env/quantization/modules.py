"""Conv2d and Linear with quantized weights and quantized input activations (fake quantization)."""

import torch
from torch import nn

from arq_env.quantization.quantizers import integer_range, to_integers


class QuantizedLayer:
    """What both kinds share: the layer computes on integers and scales once.

    ``weight`` holds the quantized weights (integer times the channel's step), ``activation_step`` the step of the input.
    The forward pass rounds the input to integers and multiplies by ``weight * activation_step``, which is the same
    function as rounding to multiples of the step, with one pass over the activations less.
    """

    def set_bits(self, weight, weight_step, weight_bits: int, activation_step, activation_bits: int, *, signed: bool) -> None:
        """Quantize the input with this step and the float ``weight`` [out, ...] with ``weight_step`` [out]."""
        step = weight_step.view(-1, *[1] * (weight.dim() - 1))
        quantized = to_integers(weight, step, *integer_range(weight_bits, signed=True)) * step
        self.weight = nn.Parameter(quantized, requires_grad=False)
        self.register_buffer("activation_step", activation_step.detach().clone())
        self.register_buffer(
            "scaled_weight", (quantized * activation_step).contiguous(memory_format=_layout(weight)), persistent=False
        )
        self.weight_bits, self.activation_bits = weight_bits, activation_bits
        self.low, self.high = integer_range(activation_bits, signed=signed)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight_bits={self.weight_bits}, activation_bits={self.activation_bits}"


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Convolution on quantized weights and activations; padding stays exact since 0 is a quantization level."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(to_integers(x, self.activation_step, self.low, self.high), self.scaled_weight, self.bias)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """Linear layer on quantized weights and activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(to_integers(x, self.activation_step, self.low, self.high), self.scaled_weight, self.bias)


def quantized_like(module: nn.Module) -> QuantizedLayer:
    """A quantized module of the same geometry, bias and training mode, whose bits are still to be set.

    It is made on the meta device, where no initial weights are drawn: they would advance torch's global generator.
    """
    if isinstance(module, nn.Conv2d):
        new = QuantizedConv2d(
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
        new = QuantizedLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
    new.bias = module.bias
    return new.train(module.training)


def _layout(weight: torch.Tensor):
    return torch.channels_last if weight.dim() == 4 else torch.contiguous_format
