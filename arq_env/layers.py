"""The layers of a network that can be quantized: what they are called, how big they are, what they cost."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from arq_env.kinds import KINDS, Kind, Linear, has_hooks, kind_of
from arq_env.operations import Operations, record_operations
from arq_env.support.errors import ArqError
from arq_env.support.settings import MAX_BITS, MIN_BITS


@dataclass(frozen=True)
class Layer:
    """One module that can be quantized; sizes are those seen for one input image.

    :param name: fully qualified, as in ``named_modules()``; the first of its names
    :param kind: "conv", "transposed" or "linear"
    :param kernel: elements of the kernel window (9 for 3x3, 1 for Linear)
    :param input_size: positions of the input feature map (h times w; 1 for Linear on a vector)
    :param macs: multiply-accumulates for one image, over all calls of the layer
    :param parameters: number of weights, without bias
    :param tied_to: the first layer that reads the same tensor as this one, so that both have the same activation bits;
        None for a layer that reads a tensor first
    :param calls: how often one forward pass calls it
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
    calls: int = 1


@dataclass(frozen=True)
class Kept:
    """What stays at full precision: the operations of a module outside its layers, or a parameter.

    :param name: of the module ("." for the network itself) or of the parameter
    :param macs: multiply-accumulates for one image, at 32 x 32 bits; 0 for a parameter
    """

    name: str
    macs: int


class Layers(tuple[Layer, ...]):
    """The layers to quantize, in order of first use.

    ``kept`` is what the network multiplies beside them, ``operators`` are the names of all operators that it is made of.
    ``fixed`` are the weight and activation bits of layers that have no choice (None for what :data:`arq_env.bitwidths.END_BITS`
    says), ``widths`` the bit-widths that the others choose from; see :func:`arq_env.bitwidths.restrict`.
    """

    kept: tuple[Kept, ...] = ()
    operators: frozenset[str] = frozenset()
    fixed: dict[str, tuple[int, int]] | None = None
    widths: tuple[int, ...] = tuple(range(MIN_BITS, MAX_BITS + 1))

    def __new__(cls, layers: Iterable[Layer], kept: Iterable[Kept] = (), operators: Iterable[str] = ()):
        new = super().__new__(cls, layers)
        new.kept, new.operators = tuple(kept), frozenset(operators)
        return new


def kept_macs(layers: tuple[Layer, ...]) -> int:
    """Multiply-accumulates that stay at full precision, whatever the map."""
    return sum(kept.macs for kept in getattr(layers, "kept", ()))


def total_macs(layers: tuple[Layer, ...]) -> int:
    """Multiply-accumulates of the whole network for one image."""
    return sum(layer.macs for layer in layers) + kept_macs(layers)


def find_layers(network: nn.Module, input_shape: tuple[int, ...], keep: Iterable[str] = ()) -> Layers:
    """List the layers that a forward pass uses and that can be quantized, in order of first use.

    Everything else that multiplies, and every other weight that takes part, stays at full precision and has to be named by
    ``keep``. The multiply-accumulates are compared with torch's own counter.

    :param input_shape: of one image, as [c, h, w]
    :param keep: names of modules or parameters that stay at full precision, with ``*`` for any part of a name; a module's name
        stands for what it computes itself, not for the layers in it
    :raises ArqError: when there is no layer, naming the module types that are there; when something else holds weights or
        multiplies and is not named; when two layers share a weight; when the network cannot be run
    """
    _check_network(network)
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    modules = {
        name: (module, kind)
        for name, module in network.named_modules()
        if (kind := kind_of(module)) is not None and not any(fnmatchcase(name, pattern) for pattern in keep)
    }
    with _read_by(modules) as reads:
        operations = run_once(network, input_shape)
    if not reads:
        kinds = Counter(type(m).__name__ for m in network.modules())
        raise ArqError(
            f"the network uses no layer that can be quantized ({', '.join(kind.module.__name__ for kind in KINDS)}); it is made of "
            + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        )
    kept = _kept(network, operations, reads, keep)
    first_reader: dict[tuple, str] = {}
    layers = []
    for name, calls in reads.items():
        layer = _describe(name, *modules[name], calls)
        if layer.macs != operations.macs.get(name, 0):
            raise ArqError(
                f"layer {name!r} seems to take {layer.macs} multiply-accumulates an image, and torch counts "
                f"{operations.macs.get(name, 0)}: leave it at full precision with keep=[{name!r}]"
            )
        first = first_reader.setdefault(tuple(call.read for call in calls), name)
        layers.append(layer if first == name else _tied(layer, first))
    return Layers(layers, kept, operations.operators)


def _tied(layer: Layer, first: str) -> Layer:
    return Layer(**vars(layer) | {"tied_to": first})


def _check_network(network) -> None:
    if kind_of(network) is not None:
        raise ArqError("the network is a single layer, which has no name: wrap it in nn.Sequential")
    if isinstance(network, torch.jit.ScriptModule):
        raise ArqError("the network is a TorchScript module, whose layers cannot be replaced: give the module it was made from")
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ArqError(f"{name!r} has values of {tensor.dtype}: convert the network with .float() before quantizing it")
    owners: dict[int, str] = {}
    for name, module in network.named_modules():
        if kind_of(module) is not None and not parametrize.is_parametrized(module):
            first = owners.setdefault(id(module.weight), name)
            if first != name:
                raise ArqError(
                    f"layers {first!r} and {name!r} are two modules with one weight: use one module twice, so that it has one step"
                )


def run_once(network: nn.Module, input_shape: tuple[int, ...]) -> Operations:
    """What one image of noise makes the network compute.

    :raises ArqError: when it fails
    """
    device = next(network.parameters(), torch.empty(0)).device
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)).mul_(0.25).add_(0.5).to(device)
    was_training = network.training
    try:
        network.eval()
        with torch.no_grad():
            return record_operations(network, image)
    except ArqError:
        raise
    except Exception as error:
        raise ArqError(
            f"the network cannot be run on an image {[*input_shape]} ({type(error).__name__}: {_first_line(error)}): it must "
            "take one batch [n, c, h, w], and input_shape must be that of its images"
        ) from error
    finally:
        network.train(was_training)


@dataclass(frozen=True)
class _Call:
    """One call of a layer: ``read`` is where and what its input was, equal for two that read the same values."""

    read: tuple
    tensor: torch.Tensor  # kept, so that no later tensor gets its place in memory
    macs: int


@contextmanager
def _read_by(modules: dict[str, tuple[nn.Module, type[Kind]]]) -> Iterator[dict[str, list[_Call]]]:
    """Note each call of these modules while the block runs: name to calls, in order of first use."""
    calls: dict[str, list[_Call]] = {}

    def record(name, kind):
        def hook(module, args, kwargs, output):
            tensor = args[0] if args else kwargs["input"]
            # Two views of one memory are the same tensor; after a change in place they are not.
            read = tensor.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version
            calls.setdefault(name, []).append(_Call(read, tensor, kind.macs(tensor, output, module.weight)))

        return hook

    hooks = [module.register_forward_hook(record(name, kind), with_kwargs=True) for name, (module, kind) in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _kept(network, operations: Operations, found, keep) -> list[Kept]:
    """What is computed outside the layers found.

    :raises ArqError: where it is not named by ``keep``, or ``keep`` names what is not there
    """
    everything = sum(operations.macs.values())
    rest = [Kept(name or ".", macs) for name, macs in operations.macs.items() if macs and name not in found]
    rest_names = {kept.name for kept in rest}
    owners = {tensor: name for name, tensor in network.named_parameters() if tensor in operations.parameters}
    for tensor, name in owners.items():
        inside = any(name.startswith(f"{layer}.") for layer in found)
        owned = any(name.startswith(f"{kept.name}.") for kept in rest) or ("." in rest_names and "." not in name)
        # Norms and biases have one dimension, and scales of channels only one that is longer than 1.
        if not inside and not owned and sum(size > 1 for size in tensor.shape) >= 2:
            rest.append(Kept(name, 0))
    used = {pattern for pattern in keep for kept in rest if fnmatchcase(kept.name, pattern)}
    for pattern in keep:
        if pattern not in used:
            raise ArqError(f"keep names {pattern!r}, which multiplies nothing and holds no weight in use: leave it out")
    modules = dict(network.named_modules())
    unnamed = [kept for kept in rest if not any(fnmatchcase(kept.name, pattern) for pattern in keep)]
    if unnamed:
        told = [f"{kept.name!r} ({_why(modules.get('' if kept.name == '.' else kept.name), kept, everything)})" for kept in unnamed]
        shown = ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")
        share = sum(kept.macs for kept in unnamed) / max(everything, 1)
        raise ArqError(
            f"these parts would stay at full precision, {share:.1%} of all multiply-accumulates: {shown}; use modules that can be "
            "quantized there, or allow it by naming them in keep"
        )
    return rest


def _why(module: nn.Module | None, kept: Kept, everything: int) -> str:
    """What a part is, and why it is not quantized."""
    if module is None:
        return "a parameter that no layer owns"
    reason = f"{type(module).__name__}, {kept.macs / everything:.1%}"
    if not isinstance(module, tuple(kind.module for kind in KINDS)):
        return reason
    if has_hooks(module):  # older ways of torch.nn.utils to change a weight are hooks, too
        return reason + ", has hooks: remove them, or fold them with remove_weight_norm, remove_spectral_norm or prune.remove"
    return reason + ", has a forward of its own"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def _describe(name: str, module: Any, kind: type[Kind], calls: list[_Call]) -> Layer:
    read = calls[0].tensor
    linear = kind is Linear
    channels = module.in_features if linear else module.in_channels
    return Layer(
        name=name,
        kind=kind.name,
        in_channels=channels,
        out_channels=module.out_features if linear else module.out_channels,
        kernel=1 if linear else math.prod(module.kernel_size),
        stride=1 if linear else max(module.stride),
        depthwise=not linear and module.groups == module.in_channels > 1,
        input_size=read.numel() // channels,
        macs=sum(call.macs for call in calls),
        parameters=module.weight.numel(),
        calls=len(calls),
    )
