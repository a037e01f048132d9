"""The bit-width map: how many bits each layer's weights and input activations get, and its file."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arq_env.layers import Layer, kept_macs, total_macs
from arq_env.support.errors import ArqError, reason, shown
from arq_env.support.files import checked_path, read_json, write_json
from arq_env.support.settings import MAX_BITS, MIN_BITS

#: Bits of the first and the last layer by default; every method in the field leaves them at 8.
END_BITS = 8
#: What uniform bits are called, such as W4A4.
UNIFORM = re.compile(r"W(\d)A(\d)")
FORMAT, VERSION = "arq-bit-widths", 1


class Bits(NamedTuple):
    """Bit-widths of one layer: of its weights, and of the activations it reads."""

    weight: int
    activation: int


#: Layer name to its bits, in the order of the layers.
BitWidthMap = dict[str, Bits]


def free_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers whose bits are chosen: all but the first and the last (all, where there are only two)."""
    return layers[1:-1] if len(layers) > 2 else layers


def complete(chosen: BitWidthMap, layers: tuple[Layer, ...], end_bits: int = END_BITS) -> BitWidthMap:
    """Add ``end_bits`` for every layer that ``chosen`` leaves out, in the order of ``layers``.

    A layer that reads the same tensor as an earlier one gets that one's activation bits.
    """
    bit_widths: BitWidthMap = {}
    for layer in layers:
        bits = chosen.get(layer.name, Bits(end_bits, end_bits))
        bit_widths[layer.name] = bits if layer.tied_to is None else bits._replace(activation=bit_widths[layer.tied_to].activation)
    return bit_widths


def uniform(layers: tuple[Layer, ...], weight: int, activation: int, end_bits: int = END_BITS) -> BitWidthMap:
    """The same bits for every free layer, ``end_bits`` for the first and the last."""
    return complete({layer.name: Bits(weight, activation) for layer in free_layers(layers)}, layers, end_bits)


def named_uniform(name: str, layers: tuple[Layer, ...]) -> BitWidthMap | None:
    """The map of uniform bits that ``W4A4`` and the like name; None where the name is not of that form.

    :raises ArqError: for bits that no map may have, such as ``W9A9``
    """
    bits = UNIFORM.fullmatch(name)
    if bits is None:
        return None
    bit_widths = uniform(layers, *map(int, bits.groups()))
    check_map(bit_widths, layers)
    return bit_widths


def bops(bit_widths: BitWidthMap, layers: tuple[Layer, ...]) -> int:
    """Bit operations: the sum of MACs x weight bits x activation bits, and 32 x 32 for what stays at full precision."""
    chosen = sum(layer.macs * bit_widths[layer.name].weight * bit_widths[layer.name].activation for layer in layers)
    return chosen + 1024 * kept_macs(layers)


def bops_fraction(bit_widths: BitWidthMap, layers: tuple[Layer, ...]) -> float:
    """Bit operations as a fraction of FP32's (32 x 32)."""
    return bops(bit_widths, layers) / (1024 * total_macs(layers))


def check_map(bit_widths: BitWidthMap, layers: tuple[Layer, ...]) -> None:
    """Raise an ArqError that names the layer, unless the map is one for these layers with bits from 2 to 8."""
    if not isinstance(bit_widths, Mapping):
        raise ArqError(f"the map is {shown(bit_widths)}: give a dictionary of Bits(weight, activation) by layer name")
    names = {layer.name for layer in layers}
    for name in bit_widths:
        if name not in names:
            raise ArqError(f"the map names a layer {name!r} that the network does not have: is it a map for another network?")
    for name in names:
        if name not in bit_widths:
            raise ArqError(f"the map leaves out layer {name!r}: give its weight_bits and activation_bits")
    for name, bits in bit_widths.items():
        if not (isinstance(bits, tuple) and len(bits) == 2):
            raise ArqError(f"layer {name!r} has bits {shown(bits)}: give Bits(weight, activation)")
        for kind, value in zip(Bits._fields, bits, strict=True):
            if type(value) is not int or not MIN_BITS <= value <= MAX_BITS:
                raise ArqError(f"layer {name!r} has {kind} bits {shown(value)}: give a whole number from {MIN_BITS} to {MAX_BITS}")
    for layer in layers:
        if layer.tied_to is not None and bit_widths[layer.name].activation != bit_widths[layer.tied_to].activation:
            raise ArqError(f"layers {layer.tied_to!r} and {layer.name!r} read the same tensor: give both the same activation bits")


def save_map(path: Path, bit_widths: BitWidthMap, layers: tuple[Layer, ...], **header: Any) -> None:
    """Write ``bit_widths.json``.

    :param header: ``network, dataset, sigma, budget, metrics, provenance``, as the format's readers expect them
    """
    entries = [
        {
            "name": layer.name,
            "weight_bits": bit_widths[layer.name].weight,
            "activation_bits": bit_widths[layer.name].activation,
            "macs": layer.macs,
            "parameters": layer.parameters,
        }
        for layer in layers
    ]
    header = {"format": FORMAT, "version": VERSION} | header
    extra = {key: header.pop(key) for key in ("metrics", "provenance") if key in header}
    document = header | {"bops_fraction": bops_fraction(bit_widths, layers), "layers": entries} | extra
    write_json(path, document)


def load_map(path: Path, layers: tuple[Layer, ...]) -> tuple[BitWidthMap, dict]:
    """Read a map written by :func:`save_map` or by hand; return it with the file's other entries.

    :raises ArqError: when the file is missing or malformed, or the map is not one for ``layers``: their names, and the MACs and
        weights that it states
    """
    try:
        document = read_json(checked_path("path", path))
        if document["format"] != FORMAT or document["version"] != VERSION:
            raise ArqError(
                f"{path} has format {document['format']} version {document['version']}: {FORMAT} version {VERSION} is read here"
            )
        entries = document.pop("layers")
        bit_widths = {}
        for entry in entries:
            if entry["name"] in bit_widths:
                raise ValueError(f"it names layer {entry['name']!r} twice")
            bit_widths[entry["name"]] = Bits(entry["weight_bits"], entry["activation_bits"])
    except ArqError:
        raise
    except OSError as error:
        raise ArqError(f"{path} cannot be read ({error.strerror}): give the path of a bit_widths.json") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ArqError(f"{path} is not a bit-width map ({reason(error)}): it needs format, version and layers") from error
    check_map(bit_widths, layers)
    stated = {entry["name"]: entry for entry in entries}
    for layer in layers:
        for key in ("macs", "parameters"):
            if (value := stated[layer.name].get(key, getattr(layer, key))) != getattr(layer, key):
                raise ArqError(
                    f"{path} says that layer {layer.name!r} has {value!r} {key} where it has {getattr(layer, key)}: it is a map "
                    "for another network or other images"
                )
    budget = document.get("budget")
    if not (budget is None or isinstance(budget, dict) or type(budget) in (int, float) and 0 < budget <= 1):
        raise ArqError(f"{path} has budget {budget!r}: give a fraction of FP32's bit operations in (0, 1], or limits by kind")
    return {layer.name: bit_widths[layer.name] for layer in layers}, document
