"""The quantized network as a file: weights, step sizes and statistics, with a card that says what it is."""

import copy
import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from arq_env.bitwidths import BitWidthMap
from arq_env.errors import ArqError
from arq_env.layers import Layer
from arq_env.networks.checkpoints import build_network, read_weights, save_checkpoint
from arq_env.quantization.exact import exact_norms
from arq_env.quantization.integer import weight_codes
from arq_env.quantization.modules import QuantizedLayer, replace_module


def model_bytes(network: nn.Module, layers: tuple[Layer, ...], bit_widths: BitWidthMap | None) -> int:
    """Size with weights packed at their bits, and steps, biases and statistics as float32.

    :param network: the FP32 network, or any made from it
    :param bit_widths: None for FP32
    """
    names = {f"{layer.name}.{kind}" for layer in layers for kind in ("weight", "activation_step")}
    state = network.state_dict().items()
    rest = sum(4 * tensor.numel() for name, tensor in state if name not in names and tensor.is_floating_point())
    if bit_widths is None:
        return rest + 4 * sum(layer.parameters for layer in layers)
    packed = sum(math.ceil(layer.parameters * bit_widths[layer.name].weight / 8) for layer in layers)
    return rest + packed + 4 * sum(layer.out_channels + 1 for layer in layers)


def save_quantized(network: nn.Module, path: Path, card: dict) -> dict:
    """Write the network's state (float32, weights on their levels) and, beside it, its card with the bits of each layer.

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
    :raises ArqError: when a file is missing, damaged or not such a network
    """
    path = Path(path)
    try:
        state, card = read_weights(path)
        if base is None:
            with torch.device("meta"):
                network = build_network(card["network"])
        else:
            network = copy.deepcopy(base)
        for layer in card["layers"]:
            name = layer["name"]
            module = QuantizedLayer(network.get_submodule(name), name)
            if f"{name}.codes" not in state:  # of the first version: quantized weights in place of integers and steps
                weight = state.pop(f"{name}.weight")
                state[f"{name}.codes"], state[f"{name}.weight_step"] = weight_codes(weight, layer["weight_bits"])
            module.set_codes(
                state[f"{name}.codes"],
                state[f"{name}.weight_step"],
                layer["weight_bits"],
                state[f"{name}.activation_step"],
                layer["activation_bits"],
                lowest=_lowest(layer),
            )
            replace_module(network, name, module)
        network.load_state_dict(state, assign=True)
    except ArqError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, SafetensorError) as error:
        raise ArqError(f"{path} cannot be loaded ({error}): give a .safetensors file of a quantized network") from error
    return exact_norms(network.eval()).to(memory_format=torch.channels_last), card


def _lowest(layer: dict) -> int:
    """The least integer that a layer's input is rounded to; cards of the first version say only whether it is negative."""
    if "lowest_activation" in layer:
        return layer["lowest_activation"]
    return 1 - 2 ** (layer["activation_bits"] - 1) if layer["signed_activations"] else 0
