"""The layers of a network that can be quantized: what they are called, how big they are, what they cost."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from arq_env.errors import ArqError


@dataclass(frozen=True)
class Layer:
    """One Conv2d or Linear; sizes are those seen for one input image.

    :param name: fully qualified, as in ``named_modules()``
    :param kernel: elements of the kernel window (9 for 3x3, 1 for Linear)
    :param input_size: positions of the input feature map (h times w; 1 for Linear)
    :param macs: multiply-accumulates for one image, over all calls of the layer
    :param parameters: number of weights, without bias
    :param tied_to: the first layer that reads the same tensor as this one, so that both have the same activation bits;
        None for a layer that reads a tensor first
    """

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    depthwise: bool
    input_size: int
    macs: int
    parameters: int
    tied_to: str | None = None


def find_layers(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[Layer, ...]:
    """List the Conv2d and Linear layers that a forward pass uses, in order of first use.

    :param input_shape: of one image, as [c, h, w]
    :raises ArqError: when there is none, naming the module types that are there; when two names share a module
    """
    calls: dict[str, tuple[torch.Tensor, int]] = {}  # the tensors are kept, so that each has an identity of its own

    def record(name):
        def hook(module, inputs, output):
            read, macs = calls.get(name, (inputs[0], 0))
            calls[name] = (read, macs + _macs(module, output))

        return hook

    kinds = (nn.Conv2d, nn.Linear)
    modules = {name: m for name, m in network.named_modules(remove_duplicate=False) if isinstance(m, kinds)}
    if isinstance(network, kinds):
        raise ArqError("the network is a single layer, which has no name: wrap it in nn.Sequential")
    first_names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        if first_names.setdefault(module, name) != name:
            raise ArqError(f"layers {first_names[module]!r} and {name!r} are one module: give each its own, so that each has bits")
    hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    was_training = network.training
    try:
        parameter = next(network.parameters(), torch.empty(0))
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *input_shape, device=parameter.device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    if not calls:
        kinds = Counter(type(m).__name__ for m in network.modules())
        raise ArqError(
            "the network uses no Conv2d and no Linear layer, so there is nothing to quantize; it is made of "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        )
    readers: dict[int, str] = {}
    for name, (read, _) in calls.items():
        readers.setdefault(id(read), name)
    return tuple(
        _describe(name, modules[name], read.shape, macs, first if (first := readers[id(read)]) != name else None)
        for name, (read, macs) in calls.items()
    )


def _macs(module, output) -> int:
    per_output = module.weight[0].numel()
    positions = output.numel() // output.shape[0]
    return positions * per_output


def _describe(name, module, shape, macs, tied_to) -> Layer:
    conv = isinstance(module, nn.Conv2d)
    return Layer(
        name=name,
        kind="conv" if conv else "linear",
        in_channels=module.in_channels if conv else module.in_features,
        out_channels=module.out_channels if conv else module.out_features,
        kernel=math.prod(module.kernel_size) if conv else 1,
        stride=max(module.stride) if conv else 1,
        depthwise=conv and module.groups == module.in_channels > 1,
        input_size=math.prod(shape[2:]) if conv else math.prod(shape[1:-1]),
        macs=macs,
        parameters=module.weight.numel(),
        tied_to=tied_to,
    )
