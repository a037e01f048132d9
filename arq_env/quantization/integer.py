"""The quantized network on integer kernels: 8-bit codes in, exact sums, scaled once on the way out."""

import copy
import functools

import torch
from torch import nn

from arq_env.kinds import Conv2d
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.quantization.quantizers import weight_range
from arq_env.support.errors import ArqError, shown


def integer_network(network: nn.Module) -> nn.Module:
    """A copy whose quantized convolutions compute on 8-bit integers (oneDNN), faster than on floats that hold them.

    The same function, bit for bit where the original's sums are exact. For inference on an x86 CPU. A layer stays as it is where
    oneDNN has no fast kernel for its groups, and without VNNI where sums would saturate, as those of 8-bit weights and inputs do.

    :param network: from :class:`arq_env.quantization.Quantizer` or :func:`arq_env.quantization.load_quantized`
    :raises ArqError: when the CPU is not one, the network is elsewhere or has no quantized layer, and, naming it, for a layer
        whose padding the kernels do not know
    """
    if not isinstance(network, nn.Module):
        raise ArqError(f"network is {shown(network)}: give a torch module")
    if not integer_kernels():
        raise ArqError("integer kernels need an x86 CPU with AVX2, and a torch that sees it: use the network as it is")
    converted = copy.deepcopy(network)
    there = {id(module.layer) for module in converted.modules() if isinstance(module, IntegerConv2d)}
    quantized = [(name, module) for name, module in converted.named_modules() if isinstance(module, QuantizedLayer)]
    layers = [(name, module) for name, module in quantized if module.kind is Conv2d and id(module) not in there]
    if not layers and not there:
        raise ArqError("the network has no quantized convolution to run on integers: quantize it first")
    for name, module in layers:
        if module.codes.device.type != "cpu":
            raise ArqError(f"layer {name!r} is on {module.codes.device}: move the network to the CPU, where integer kernels run")
        if largest_pair(module) <= exact_pairs() and _fast(module):
            replace_module(converted, name, IntegerConv2d(module))
    return converted.eval()


def on_integers(network: nn.Module) -> nn.Module:
    """The network with integer kernels wherever they give the same bits sooner, in place."""
    for name, module in list(network.named_modules()):
        if _can(module) and largest_pair(module) <= exact_pairs() and module.largest_sum() < 2**24 and _fast(module):
            replace_module(network, name, IntegerConv2d(module))
    return network


def _can(module: nn.Module) -> bool:
    """Whether a module is a quantized convolution that the kernels know."""
    kind, mode, padding = (getattr(module, name, None) for name in ("kind", "padding_mode", "padding"))
    known = isinstance(module, QuantizedLayer) and kind is Conv2d and mode == "zeros" and not isinstance(padding, str)
    return known and module.codes.device.type == "cpu"


def _fast(layer) -> bool:
    """Whether oneDNN has a kernel for the layer's groups, not only its reference, a hundred times slower than floats."""
    outputs, inputs = len(layer.codes) // layer.groups, layer.codes.shape[1]
    return layer.groups == 1 or inputs == outputs == 1 or inputs % 4 == outputs % 4 == 0


def largest_pair(layer: QuantizedLayer) -> int:
    """No sum of two products of the layer's codes, taken as the kernels take them (inputs from 0), is larger."""
    return 2 * (layer.highest - layer.lowest) * int(layer.codes.int().abs().max())


@functools.cache
def exact_pairs() -> int:
    """Up to which sum of two products this CPU's kernels for 8-bit integers are exact; -1 where it has none.

    With VNNI they add in 32 bits. Otherwise they add each two products in 16 bits and saturate, which few bits never reach. Both
    as torch says and as such sums come out.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("avx512_vnni", False) and _sums_are_exact(255, 127):
        return 2**31 - 1
    return 2**15 - 1 if capabilities.get("avx2", False) and _sums_are_exact(129, 127) else -1


def integer_kernels() -> bool:
    """Whether this CPU has kernels for 8-bit integers."""
    return exact_pairs() >= 0


def _sums_are_exact(code: int, weight: int) -> bool:
    codes = torch.full((1, 64, 3, 3), code, dtype=torch.uint8)
    weights = torch.full((16, 64, 3, 3), weight, dtype=torch.int8)
    ones, zeros, geometry = torch.ones(16), torch.zeros(16, dtype=torch.long), [[1, 1], [0, 0], [1, 1], 1]
    packed = torch.ops.onednn.qconv_prepack(weights, ones, 1.0, 0, *geometry)
    after: tuple = 1.0, 0, torch.float32, "none", [], ""
    sums = torch.ops.onednn.qconv_pointwise(codes, 1.0, 0, packed, ones, zeros, None, *geometry, *after)
    return bool((sums == code * weight * 64 * 9).all())


def weight_codes(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers [out, ...] (int8) and steps [out] whose product is the quantized ``weight``.

    A channel's largest magnitude is some whole number k of steps: the least k with which all of its weights come out whole.

    :raises ArqError: when a channel is not on so few levels

    >>> codes, steps = weight_codes(torch.tensor([[0.5, -0.25, 0.0], [2.0, 2.0, -2.0]]), 3)
    >>> codes.tolist(), steps.tolist()
    ([[2, -1, 0], [1, 1, -1]], [0.25, 2.0])
    """
    rows = weight.detach().flatten(1)
    largest = rows.abs().amax(1)
    steps = torch.where(largest == 0, 1.0, torch.nan)
    for count in range(1, weight_range(bits)[1] + 1):
        step = largest / count
        whole = rows / step[:, None]
        fits = ((whole - whole.round()).abs().amax(1) < 1e-3) & steps.isnan()
        steps = torch.where(fits, step, steps)
    if steps.isnan().any():
        raise ArqError(f"channel {int(steps.isnan().nonzero()[0])} has weights on more levels than {bits} bits have")
    return (rows / steps[:, None]).round().to(torch.int8).view(weight.shape), steps


class IntegerConv2d(nn.Module):
    """A quantized convolution whose sums are made of unsigned 8-bit codes and signed 8-bit codes, in 32 bits."""

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            padding = f"{layer.padding!r} of {layer.padding_mode!r}"
            raise ArqError(f"layer {layer.name!r} has padding {padding}: integer kernels pad with zeros, by a number")
        if largest_pair(layer) > exact_pairs():
            raise ArqError(f"layer {layer.name!r} saturates on this CPU's integer kernels: use the network as it is")
        largest = layer.largest_sum()
        if largest >= 2**31:
            raise ArqError(f"layer {layer.name!r} can have sums up to {largest}: integer kernels sum in 32 bits")
        self.layer = layer
        self.zero = -layer.lowest  # the kernels take unsigned inputs: 0 becomes this code
        self.geometry = [*(list(getattr(layer, name)) for name in ("stride", "padding", "dilation")), layer.groups]
        self._pack()
        self.train(layer.training)

    def _pack(self):
        outputs = len(self.layer.codes)
        self.ones, self.zeros = torch.ones(outputs), torch.zeros(outputs, dtype=torch.long)
        self.packed = torch.ops.onednn.qconv_prepack(self.layer.codes, self.ones, 1.0, self.zero, *self.geometry)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The quantized layer's output, float32."""
        codes = self.layer.integers(x)
        codes = (codes.add_(self.zero) if self.zero else codes).to(torch.uint8)
        weight = self.packed, self.ones, self.zeros, None
        as_they_are: tuple = 1.0, 0, torch.float32, "none", [], ""
        sums = torch.ops.onednn.qconv_pointwise(codes, 1.0, self.zero, *weight, *self.geometry, *as_they_are)
        return self.layer.scaled(sums)

    def __getstate__(self):
        return {name: value for name, value in super().__getstate__().items() if name != "packed"}

    def __setstate__(self, state):
        super().__setstate__(state)
        if largest_pair(self.layer) > exact_pairs():  # made on another CPU
            raise ArqError(f"layer {self.layer.name!r} saturates on this CPU's integer kernels: send the network as it is")
        self._pack()  # the kernel's own layout cannot be copied
