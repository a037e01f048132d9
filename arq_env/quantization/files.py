"""The quantized network as a file: weights, step sizes and statistics, with a card that says what it is."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from arq_env.bitwidths import MAX_BITS, MIN_BITS, BitWidthMap
from arq_env.errors import ArqError, reason
from arq_env.layers import Layer, kind_of
from arq_env.networks.checkpoints import build_network, channels_last, give_state, read_weights, save_checkpoint
from arq_env.quantization.convert import copy_network
from arq_env.quantization.exact import exact_norms
from arq_env.quantization.integer import weight_codes
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.quantization.quantizers import lowest_levels, weight_range

#: Largest distance of a weight from its level, as a share of its channel's largest: some roundings of float32.
ROUNDING = 1e-6


def model_bytes(network: nn.Module, layers: tuple[Layer, ...], bit_widths: BitWidthMap | None) -> int:
    """Size with weights packed at their bits, and steps, biases and statistics as float32.

    Of a layer its weights count, and its bias; not what a parametrization, a mask or fine-tuning keeps beside them. What has two
    names counts once.

    :param network: the FP32 network, or any made from it
    :param bit_widths: None for FP32
    """
    state = {id(tensor): (name, tensor) for name, tensor in reversed(network.state_dict(keep_vars=True).items())}
    names = {layer.name for layer in layers}
    rest = 0
    for name, tensor in state.values():
        of_layer = any(name.startswith(f"{layer}.") for layer in names) and name.rpartition(".")[2] != "bias"
        if tensor.is_floating_point() and not of_layer:
            rest += 4 * tensor.numel()
    if bit_widths is None:
        return rest + 4 * sum(layer.parameters for layer in layers)
    packed = sum(math.ceil(layer.parameters * bit_widths[layer.name].weight / 8) for layer in layers)
    return rest + packed + 4 * sum(layer.out_channels + 1 for layer in layers)


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
    path = Path(path)
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
            module = network.get_submodule(name)
            if kind_of(module) is None:
                raise ValueError(f"{name!r} is a {type(module).__name__} in the network")
            if (fault := _fault(layer, module, state)) is not None:
                raise ArqError(f"{path} cannot be loaded: layer {name!r} has {fault}; restore it or make it again")
            module = QuantizedLayer(module, name)
            module.set_codes(
                state[f"{name}.codes"],
                state[f"{name}.weight_step"],
                layer["weight_bits"],
                state[f"{name}.activation_step"],
                layer["activation_bits"],
                lowest=layer["lowest_activation"],
            )
            replace_module(network, name, module)
        give_state(network, state)
    except ArqError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError, IndexError, SafetensorError) as error:
        raise ArqError(f"{path} cannot be loaded ({reason(error)}): give a .safetensors file of a quantized network") from error
    return exact_norms(channels_last(network.eval())), card


def _fault(layer: dict, module: nn.Module, state: dict[str, torch.Tensor]) -> str | None:
    """What is wrong with a layer of a file, as its card and its tensors say; None where all is well.

    Files of the first version hold quantized weights in place of integers and steps, and their cards say only whether activations
    are signed; both are brought to today's form here.

    :param layer: its entry on the card
    :param module: what the network has there
    """
    name = layer["name"]
    for key in ("weight_bits", "activation_bits"):
        if type(layer[key]) is not int or not MIN_BITS <= layer[key] <= MAX_BITS:
            return f"{key} {layer[key]!r}, which is no whole number from {MIN_BITS} to {MAX_BITS}"
    bits, (low, high, distance) = layer["weight_bits"], weight_range(layer["weight_bits"])
    if "lowest_activation" not in layer:
        if type(layer["signed_activations"]) is not bool:
            return f"signed_activations {layer['signed_activations']!r}, which is neither true nor false"
        layer["lowest_activation"] = 1 - 2 ** (layer["activation_bits"] - 1) if layer["signed_activations"] else 0
    if (
        layer["lowest_activation"] not in [0, *lowest_levels(layer["activation_bits"])]
        or type(layer["lowest_activation"]) is not int
    ):
        return f"lowest_activation {layer['lowest_activation']!r}, where {layer['activation_bits']} bits have no range that starts"
    if f"{name}.weight" in state:
        weight = state.pop(f"{name}.weight")
        if weight.dtype != torch.float32 or not weight.isfinite().all():
            return "weights that are no finite float32 numbers"
        try:
            state[f"{name}.codes"], state[f"{name}.weight_step"] = codes, steps = weight_codes(weight, bits)
        except ArqError as error:
            return f"other weights than its card says: {error}"
        rows, whole = weight.flatten(1), codes.flatten(1) * steps[:, None]
        if ((whole - rows).abs().amax(1) > ROUNDING * rows.abs().amax(1)).any():
            return "other weights than its card says: some are between their levels"
    codes = state[f"{name}.codes"]
    if codes.dtype != torch.int8 or codes.shape != module.weight.shape:
        return f"integers of {codes.dtype} and shape {tuple(codes.shape)}, where int8 and {tuple(module.weight.shape)} are right"
    on_levels = (codes.int() >= low) & (codes.int() <= high) & ((codes.int() - low) % distance == 0)
    if not (on_levels | (codes == 0).flatten(1).all(1).view(-1, *[1] * (codes.dim() - 1))).all():
        return f"other weights than its card says: some are not among the levels that {bits} bits have"
    outputs = getattr(module, "out_channels", None) or module.out_features
    for key, shape in (("weight_step", (outputs,)), ("activation_step", ())):
        step = state[f"{name}.{key}"]
        if step.dtype != torch.float32 or step.shape != shape or not (step.isfinite() & (step > 0)).all():
            return f"{key} {step.tolist()!r}, where positive float32 numbers of shape {shape} are right"
    return None
