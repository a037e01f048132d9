"""The quantized network as a file: weights, step sizes and statistics, with a card that says what it is."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from arq_env.bitwidths import MAX_BITS, MIN_BITS, BitWidthMap
from arq_env.kinds import kind_of
from arq_env.layers import Layer
from arq_env.networks.checkpoints import build_network, channels_last, copy_network, give_state, read_weights, save_checkpoint
from arq_env.quantization.exact import exact_norms
from arq_env.quantization.integer import weight_codes
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.quantization.quantizers import weight_range
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import checked_path

#: Largest distance of a weight from its level, as a share of its channel's largest: some roundings of float32.
ROUNDING = 1e-6


def model_bytes(network: nn.Module, layers: tuple[Layer, ...], bit_widths: BitWidthMap | None) -> int:
    """Size with weights packed at their bits, and steps, biases and statistics as float32.

    Of a layer its weights count, and its bias; not what a parametrization, a mask or fine-tuning keeps beside them. What has two
    names counts once.

    :param network: the FP32 network, or any made from it
    :param bit_widths: None for FP32
    """
    if bit_widths is None:
        return bytes_beside(network, layers) + 4 * sum(layer.parameters for layer in layers)
    return bytes_beside(network, layers) + sum(packed_bytes(layer, bit_widths[layer.name].weight) for layer in layers)


def bytes_beside(network: nn.Module, layers: tuple[Layer, ...]) -> int:
    """Of :func:`model_bytes` what no map changes: biases, and all that is no layer's."""
    state = {id(tensor): (name, tensor) for name, tensor in reversed(network.state_dict(keep_vars=True).items())}
    names = {layer.name for layer in layers}
    beside = 0
    for name, tensor in state.values():
        of_layer = any(name.startswith(f"{layer}.") for layer in names) and name.rpartition(".")[2] != "bias"
        if tensor.is_floating_point() and not of_layer:
            beside += 4 * tensor.numel()
    return beside


def packed_bytes(layer: Layer, weight_bits: int) -> int:
    """Of :func:`model_bytes` a layer's packed weights and its steps: one for each output channel, and one for activations."""
    return math.ceil(layer.parameters * weight_bits / 8) + 4 * (layer.out_channels + 1)


def save_quantized(network: nn.Module, path: Path, card: dict) -> dict:
    """Write the network's state (float32, weights on their levels) and, beside it, its card with the bits of each layer.

    :param path: ending in ``.safetensors``, or anything; the card's name is the same with ``.json`` in its place, or after it
    :param card: with ``network``, its name
    :return: the card as written, with ``layers`` and ``digest``
    """
    layers = [
        {
            "name": module.name,
            "weight_bits": module.weight_bits,
            "activation_bits": module.activation_bits,
            "lowest_activation": module.lowest,
        }
        for module in network.modules()
        if isinstance(module, QuantizedLayer)
    ]
    return save_checkpoint(network, path, card | {"layers": layers})


def load_quantized(path: Path, base: nn.Module | None = None) -> tuple[nn.Module, dict]:
    """Return the network that :func:`save_quantized` wrote, in evaluation mode, and its card.

    :param base: a network of the same structure, whose weights do not matter; not needed for this package's networks
    :raises ArqError: when a file is missing, damaged or not such a network; naming the layer, when its bits are none that a map may
        have, its weights are not on so many levels, or its step is not a positive number
    """
    path = checked_path("path", path)
    try:
        state, card = read_weights(path)
        if base is None:
            with torch.device("meta"):
                network = build_network(card["network"])
        else:
            network = copy_network(base)
        seen = set()
        for layer in card["layers"]:
            name = layer["name"]
            if name in seen:
                raise ArqError(f"{path} has layer {name!r} twice on its card: restore it or make it again")
            seen.add(name)
            original: Any = network.get_submodule(name)
            if kind_of(original) is None:
                raise ArqError(
                    f"{path} cannot be loaded: {name!r} is a {type(original).__name__} in the network, which is none to quantize"
                )
            module = QuantizedLayer(original, name)
            if (fault := _fault(layer, state, original.weight.shape, module)) is not None:
                raise ArqError(f"{path} cannot be loaded: layer {name!r} has {fault}; restore it or make it again")
            module.set_codes(
                state[f"{name}.codes"],
                state[f"{name}.weight_step"],
                layer["weight_bits"],
                state[f"{name}.activation_step"],
                layer["activation_bits"],
                lowest=_lowest(layer),
            )
            replace_module(network, name, module)
        give_state(network, state)
    except ArqError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError, SafetensorError) as error:
        raise ArqError(f"{path} cannot be loaded ({reason(error)}): give a .safetensors file of a quantized network") from error
    return channels_last(exact_norms(network.eval())), card


def _lowest(layer: dict) -> int:
    """The least integer that a layer's input is rounded to; cards of the first version say only whether it is negative."""
    if "lowest_activation" in layer:
        return layer["lowest_activation"]
    return 1 - 2 ** (layer["activation_bits"] - 1) if layer["signed_activations"] else 0


def _fault(layer: dict, state: dict, shape: torch.Size, module: QuantizedLayer) -> str | None:
    """What is wrong with a layer of a file, as its card and its tensors say; None where all is well.

    Weights of the first version, which are integers times steps, are taken apart in ``state``.

    :param shape: of the weight that the network has there
    """
    for key in ("weight_bits", "activation_bits"):
        if type(layer[key]) is not int or not MIN_BITS <= layer[key] <= MAX_BITS:
            return f"{key} {layer[key]!r}, which is no whole number from {MIN_BITS} to {MAX_BITS}"
    if type(layer.get("signed_activations", False)) is not bool:
        return f"signed_activations {layer['signed_activations']!r}, which is neither true nor false"
    if type(lowest := _lowest(layer)) is not int or not -(2 ** layer["activation_bits"]) < lowest <= 0:
        return f"lowest_activation {lowest!r}, which {layer['activation_bits']} bits do not have"
    name, bits = layer["name"], layer["weight_bits"]
    if f"{name}.codes" not in state:
        weight = state.pop(f"{name}.weight")
        if weight.dtype != torch.float32 or not weight.isfinite().all():
            return "weights that are not float32, or NaN or infinite"
        try:
            codes, steps = weight_codes(weight, bits)
        except ArqError as error:
            return f"other weights than its card says: {error}"
        rows = weight.flatten(1)
        off = (codes.flatten(1) * steps[:, None] - rows).abs().amax(1) > ROUNDING * rows.abs().amax(1)
        if off.any():
            return f"other weights than its card says: channel {int(off.nonzero()[0])} has some between its levels"
        state[f"{name}.codes"], state[f"{name}.weight_step"] = codes, steps
    codes, steps, step = (state[f"{name}.{key}"] for key in ("codes", "weight_step", "activation_step"))
    if codes.dtype != torch.int8 or codes.shape != shape:
        return f"weights of {codes.dtype} and shape {tuple(codes.shape)}, where they are integers (int8) of shape {tuple(shape)}"
    rows = module.rows(codes)
    for what, values, wanted in (("weight_step", steps, rows.shape[:1]), ("activation_step", step, ())):
        if values.dtype != torch.float32 or values.shape != wanted or not (values.isfinite() & (values > 0)).all():
            return f"no {what} of shape {tuple(wanted)} in float32, finite and positive"
    low, high, distance = weight_range(bits)
    off = (rows < low) | (rows > high) | ((rows - low) % distance != 0)
    off &= (rows != 0).any(1, keepdim=True)  # a channel of nothing but zeros is on no level of 2 bits, and does no harm
    if off.any():
        return f"other weights than its card says: channel {int(off.any(1).nonzero()[0])} has some that {bits} bits do not have"
    return None
