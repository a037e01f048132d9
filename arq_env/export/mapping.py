"""Bits, levels and steps of each layer as a plain JSON file, for who quantizes with other packages."""

from pathlib import Path

from torch import nn

from arq_env.export.cards import kept_entries, some_quantized_layers
from arq_env.quantization.quantizers import weight_range
from arq_env.support.files import write_json
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
