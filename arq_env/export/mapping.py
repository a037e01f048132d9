"""Bits, levels and steps of each layer as a plain JSON file, for who quantizes with other packages."""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from arq_env.export.cards import kept_entries, some_quantized_layers
from arq_env.layers import Kind, kind_of
from arq_env.networks.checkpoints import copy_network
from arq_env.quantization.quantizers import highest, weight_range
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import read_json, write_json
from arq_env.support.provenance import provenance

FORMAT, VERSION = "arq-mapping", 1


def save_mapping(network: nn.Module, path: Path, card: dict) -> dict:
    """Write what each layer's weights and input are rounded to; return the document.

    For each layer by its name: ``weight`` with ``bits``, ``levels`` (the integers, from least to greatest) and ``steps`` (one for
    each output channel); ``activation`` with ``bits``, ``lowest`` and ``highest`` (integers) and ``step``. A value is its integer
    times its step: round(clip(x / step, lowest, highest)) step, ties to even.

    :param network: from :func:`arq_env.quantization.load_quantized` or a quantizer
    """
    layers = {}
    for name, layer in some_quantized_layers(network).items():
        low, high, distance = weight_range(layer.weight_bits)
        layers[name] = {
            "weight": {
                "bits": layer.weight_bits,
                "levels": list(range(low, high + 1, distance)),
                "steps": layer.weight_step.tolist(),
            },
            "activation": {
                "bits": layer.activation_bits,
                "lowest": layer.lowest,
                "highest": layer.highest,
                "step": layer.activation_step.item(),
            },
        }
    document = {"format": FORMAT, "version": VERSION, **kept_entries(card), "layers": layers, "provenance": provenance()}
    write_json(path, document)
    return document


def brevitas_network(network: nn.Module, path: Path) -> nn.Module:
    """A copy of a float network whose layers round as a mapping says, by Brevitas's ``IntQuant``, with gradients straight through.

    :param network: with the weights that are to be rounded; it is not changed
    :param path: a mapping for a network of this structure
    :raises ArqError: when the file is none, or not for this network, naming the layer, or Brevitas is not installed
    """
    try:
        from brevitas.core.quant import IntQuant
    except ImportError as error:
        raise ArqError(f"Brevitas cannot be imported ({reason(error)}): pip install brevitas") from error

    class Rounding(nn.Module):
        """IntQuant with one layer's numbers."""

        def __init__(self, step, zero: float, bits: int, *, signed: bool, narrow: bool):
            super().__init__()
            self.quant = IntQuant(narrow_range=narrow, signed=signed, input_view_impl=nn.Identity())
            for name, value in {"step": step, "zero": torch.tensor(float(zero)), "bits": torch.tensor(float(bits))}.items():
                self.register_buffer(name, value)

        def forward(self, values):
            return self.quant(self.step, self.zero, self.bits, values)

    rounded = copy_network(network)
    for name, entry in _entries(path).items():
        try:
            module = rounded.get_submodule(name)
            steps, step = _steps(module, entry)
            weight_bits, bits, lowest = entry["weight"]["bits"], entry["activation"]["bits"], entry["activation"]["lowest"]
            if (
                weight_range(weight_bits)[0] != entry["weight"]["levels"][0]
                or highest(bits, lowest) != entry["activation"]["highest"]
            ):
                raise ValueError("its levels are not those of its bits")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ArqError(f"{path} does not fit layer {name!r} of this network ({reason(error)}): give its own mapping") from error
        two, symmetric = weight_bits == 2, -lowest == highest(bits, lowest)
        weight = Rounding(steps * (2 if two else 1), -0.5 if two else 0, weight_bits, signed=True, narrow=not two)
        parametrize.register_parametrization(module, "weight", weight)
        module.activation = Rounding(step, 0 if symmetric else -lowest, bits, signed=symmetric, narrow=symmetric)
        module.register_forward_pre_hook(lambda module, args: (module.activation(args[0]), *args[1:]))
    return rounded


def _entries(path: Path) -> dict:
    """What a mapping says of each layer.

    :raises ArqError: when the file cannot be read, or is another
    """
    try:
        document = read_json(path)
        if (document["format"], document["version"]) != (FORMAT, VERSION) or not isinstance(document["layers"], dict):
            raise ValueError(f"its format is not {FORMAT} version {VERSION}")
    except (OSError, ValueError, KeyError) as error:
        raise ArqError(f"{path} is not a mapping ({reason(error)}): give one that experiments/export.py wrote") from error
    return document["layers"]


def _steps(module: nn.Module, entry: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's steps in a shape that broadcasts over its weight, and the step of its input.

    :raises ValueError: when they are not positive numbers, one for each output channel
    """
    kind: type[Kind] | None = kind_of(module)
    if kind is None:
        raise ValueError(f"it is a {type(module).__name__}")
    groups = getattr(module, "groups", 1)
    rows, steps, step = kind.by_channel(module.weight, groups), entry["weight"]["steps"], entry["activation"]["step"]
    if len(steps) != len(rows) or not all(type(value) is float and 0 < value < math.inf for value in (*steps, step)):
        raise ValueError(f"it needs {len(rows)} positive steps")
    spread = torch.tensor(steps)[:, None].expand(rows.shape).contiguous()
    return kind.from_channels(spread, module.weight.shape, groups).contiguous(), torch.tensor(step)
