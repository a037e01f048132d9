"""A quantized network in one small file: weights packed at their bit-widths, everything else as it is."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from arq_env.export.cards import kept_entries, some_quantized_layers
from arq_env.layers import kind_of
from arq_env.networks.checkpoints import build_network, channels_last, copy_network, give_state
from arq_env.quantization.exact import exact_norms
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.quantization.quantizers import weight_range
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import atomic_file, parse_json, sha256
from arq_env.support.settings import MAX_BITS, MIN_BITS

#: What the file's metadata says it is.
FORMAT, VERSION = "arq-packed", "1"
WEIGHTS = "weights"
_TYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
}
#: Of a layer, what is packed, or stands on the card.
_CODES = "codes"


def save_packed(network: nn.Module, path: Path, card: dict) -> dict:
    """Write a quantized network to ``path``, by custom ``network.arq.safetensors``; return the card in its metadata.

    A safetensors file of few tensors, since a name for each would take more room than the weights: ``weights`` (uint8) holds the
    codes of all layers, each layer's from a new byte on, a code's bits from the lowest on; ``float32`` and the like hold all other
    tensors of the state of that type, in the order of ``state_dict()``. What a tensor is called and how it is shaped the network
    knows, and the file a digest of it.

    :param network: from :func:`arq_env.quantization.load_quantized` or a quantizer
    :param card: with ``network``, its name, where it is one of this package's
    :raises ArqError: where its state holds types that are not known
    """
    layers, state = some_quantized_layers(network), network.state_dict()
    packed = {WEIGHTS: np.concatenate([_packed(layer) for layer in layers.values()])}
    rest = _rest(state, layers)
    for kind in dict.fromkeys(str(tensor.dtype).removeprefix("torch.") for tensor in rest.values()):
        if kind not in _TYPES:
            raise ArqError(
                f"the network's state has tensors of {kind}, which a packed file does not hold: give {', '.join(_TYPES)}"
            )
        of_kind = [tensor.detach().cpu().flatten() for tensor in rest.values() if tensor.dtype == _TYPES[kind]]
        packed[kind] = torch.cat(of_kind).numpy()
    empty = {name: _zero_channels(layer) for name, layer in layers.items()}
    card = {
        **kept_entries(card),
        "layers": {name: [layer.weight_bits, layer.activation_bits, layer.lowest] for name, layer in layers.items()},
        "zero_channels": {name: channels for name, channels in empty.items() if channels},
        "structure": _structure(rest, layers),
        "contents": _contents(packed),
    }
    text = json.dumps(card, separators=(",", ":"))
    with atomic_file(path) as file:
        file.write(save(packed, {"format": FORMAT, "version": VERSION, "card": text}))
    return card


def load_packed(path: Path, base: nn.Module | None = None) -> tuple[nn.Module, dict]:
    """Return the network that :func:`save_packed` wrote, bit for bit, in evaluation mode, and its card.

    :param base: a network of the same structure, whose weights do not matter; not needed for this package's networks
    :raises ArqError: when the file is missing, damaged, larger or smaller than the network's structure and its bits say, or for
        another network; before anything is allocated that the file's size does not pay for
    """
    try:
        with safe_open(path, "pt") as file:
            return _unpacked(path, file, base)
    except ArqError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError, SafetensorError) as error:
        raise ArqError(f"{path} cannot be loaded ({reason(error)}): give a packed file that experiments/export.py wrote") from error


def is_packed(path: Path) -> bool:
    """Whether a safetensors file says that it is one of this format; what reading raises is left to the caller."""
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("format") == FORMAT


def _unpacked(path, file, base):
    metadata = file.metadata() or {}
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise ArqError(f"{path} is not of format {FORMAT} version {VERSION}: give a packed file that experiments/export.py wrote")
    card = parse_json(metadata["card"].encode())
    if base is None:
        if not card.get("network"):
            raise ArqError(f"{path} is of a network of somebody's own: give one of its structure (base, or --base)")
        with torch.device("meta"):
            network = build_network(card["network"])
    else:
        network = copy_network(base).to("meta")
    for name, bits in card["layers"].items():
        _place(path, network, name, bits)
    network = exact_norms(network.eval())
    layers = some_quantized_layers(network)
    rest = _rest(network.state_dict(), layers)
    if card["structure"] != _structure(rest, layers):
        raise ArqError(f"{path} is a file of another network than {card.get('network') or 'the one given'}: give that one")
    sizes = {WEIGHTS: sum(_bytes(layer) for layer in layers.values())}
    for tensor in rest.values():
        kind = str(tensor.dtype).removeprefix("torch.")
        sizes[kind] = sizes.get(kind, 0) + tensor.numel()
    there = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    if there != {name: [size] for name, size in sizes.items()}:
        raise ArqError(
            f"{path} holds other numbers of values ({there}) than its network has ({sizes}): restore it or make it again"
        )
    packed = {name: file.get_tensor(name) for name in sizes}
    if any(str(packed[name].dtype) != f"torch.{'uint8' if name == WEIGHTS else name}" for name in sizes):
        raise ArqError(f"{path} holds values of other types than their names say: restore it or make it again")
    if card["contents"] != _contents({name: tensor.numpy() for name, tensor in packed.items()}):
        raise ArqError(f"{path} is damaged (its content's SHA-256 differs from its card's): restore it or make it again")
    state, begun = {}, dict.fromkeys(sizes, 0)
    for name, tensor in rest.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        state[name] = packed[kind][begun[kind] : begun[kind] + tensor.numel()].reshape(tensor.shape).clone()
        begun[kind] += tensor.numel()
    for name, layer in layers.items():
        some = packed[WEIGHTS][begun[WEIGHTS] : begun[WEIGHTS] + _bytes(layer)].numpy()
        state[f"{name}.{_CODES}"] = _codes(layer, some, card["zero_channels"].get(name, []))
        begun[WEIGHTS] += len(some)
    for name in layers:
        for key in ("weight_step", "activation_step"):
            steps = state[f"{name}.{key}"]
            if not (steps.isfinite() & (steps > 0)).all():
                raise ArqError(f"{path} cannot be loaded: the {key} of layer {name!r} is not finite and positive")
    give_state(network, state)
    return channels_last(network), card


def _place(path, network, name, bits) -> None:
    """Put a quantized layer without values in the place of the module of that name."""
    original = network.get_submodule(name)
    if kind_of(original) is None:
        raise ArqError(
            f"{path} cannot be loaded: {name!r} is a {type(original).__name__} in the network, which is none to quantize"
        )
    weight_bits, activation_bits, lowest = bits
    if not all(type(number) is int and MIN_BITS <= number <= MAX_BITS for number in (weight_bits, activation_bits)):
        raise ArqError(f"{path} gives layer {name!r} bits {bits}: whole numbers from {MIN_BITS} to {MAX_BITS} are read")
    if type(lowest) is not int or not -(2**activation_bits) < lowest <= 0:
        raise ArqError(f"{path} gives layer {name!r} a least activation of {lowest!r}, which {activation_bits} bits do not have")
    module = QuantizedLayer(original, name)
    codes = torch.empty(original.weight.shape, dtype=torch.int8, device="meta")
    steps, step = torch.empty(len(module.rows(codes)), device="meta"), torch.empty((), device="meta")
    module.set_codes(codes, steps, weight_bits, step, activation_bits, lowest=lowest)
    replace_module(network, name, module)


def _rest(state: dict, layers: dict[str, QuantizedLayer]) -> dict[str, torch.Tensor]:
    """What of a state is not packed, each tensor once."""
    packed = {f"{name}.{_CODES}" for name in layers}
    return {name: tensor for name, tensor in state.items() if name not in packed}


def _structure(rest: dict, layers: dict) -> str:
    """A digest of names, types and shapes, by which a file tells its network from others."""
    described = [[name, str(tensor.dtype), *tensor.shape] for name, tensor in rest.items()]
    described += [[name, *layer.codes.shape] for name, layer in layers.items()]
    return sha256(json.dumps(described).encode())[:16]


def _contents(packed: dict[str, np.ndarray]) -> str:
    return sha256(b"".join(np.ascontiguousarray(packed[name]).tobytes() for name in sorted(packed)))


def _bytes(layer: QuantizedLayer) -> int:
    return math.ceil(layer.codes.numel() * layer.weight_bits / 8)


def _zero_channels(layer: QuantizedLayer) -> list[int]:
    """Channels of nothing but zeros, which is no level of 2 bits."""
    return (layer.rows(layer.codes) == 0).all(1).nonzero().flatten().tolist() if layer.weight_bits == 2 else []


def _packed(layer: QuantizedLayer) -> np.ndarray:
    """A layer's codes, counted from the least, as bits: uint8 [bytes]."""
    low, _, distance = weight_range(layer.weight_bits)
    counted = ((layer.codes.cpu().contiguous().numpy().astype(np.int16) - low) // distance).astype(np.uint8)
    bits = np.unpackbits(counted.reshape(-1, 1), axis=1, count=layer.weight_bits, bitorder="little")
    return np.packbits(bits.flatten(), bitorder="little")


def _codes(layer: QuantizedLayer, packed: np.ndarray, zero_channels: list[int]) -> torch.Tensor:
    """The inverse of :func:`_packed`.

    :raises ArqError: for a code that is none of the layer's bits, or a channel that it does not have
    """
    low, high, distance = weight_range(layer.weight_bits)
    bits = np.unpackbits(packed, count=layer.codes.numel() * layer.weight_bits, bitorder="little")
    counted = np.packbits(bits.reshape(-1, layer.weight_bits), axis=1, bitorder="little").astype(np.int16)
    values = counted * distance + low
    if values.max(initial=low) > high:
        raise ArqError(
            f"layer {layer.name!r} has weights that {layer.weight_bits} bits do not have: restore the file or make it again"
        )
    codes = torch.from_numpy(values.astype(np.int8)).reshape(layer.codes.shape)
    if zero_channels:
        rows = layer.rows(codes).clone()
        rows[zero_channels] = 0
        codes = layer._from_rows(rows, codes.shape)
    return codes
