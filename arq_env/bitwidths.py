"""The bit-width map: how many bits each layer's weights and input activations get, and its file."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from arq_env.layers import Layer, Layers, kept_macs, total_macs
from arq_env.support.errors import ArqError, reason, shown
from arq_env.support.files import checked_path, read_json, write_json
from arq_env.support.settings import MAX_BITS, MIN_BITS, UNIFORM

#: Bits at which the first and the last layer are fixed by default; every method in the field leaves them at 8.
END_BITS = 8
#: Weight and activation bits as text, such as 4/8.
PAIR = re.compile(rf"([{MIN_BITS}-{MAX_BITS}])/([{MIN_BITS}-{MAX_BITS}])")
FORMAT, VERSION = "arq-bit-widths", 1


class Bits(NamedTuple):
    """Bit-widths of one layer: of its weights, and of the activations it reads."""

    weight: int
    activation: int


#: Layer name to its bits, in the order of the layers.
BitWidthMap = dict[str, Bits]


def fixed_layers(layers: tuple[Layer, ...]) -> BitWidthMap:
    """The layers whose bits nobody chooses, and their bits: as :func:`restrict` says, else the first and the last layer at 8 bits.

    (Else none, where there are only two.)
    """
    fixed = getattr(layers, "fixed", None)
    if fixed is None:
        ends = (layers[0], layers[-1]) if len(layers) > 2 else ()
        return {layer.name: Bits(END_BITS, END_BITS) for layer in ends}
    return {name: Bits(*bits) for name, bits in fixed.items()}


def free_layers(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers whose bits are chosen: those that are not fixed."""
    fixed = fixed_layers(layers)
    return tuple(layer for layer in layers if layer.name not in fixed)


def widths_of(layers: tuple[Layer, ...]) -> tuple[int, ...]:
    """The bit-widths that they are chosen from, rising."""
    return getattr(layers, "widths", Layers.widths)


def restrict(layers: Layers, fix: Mapping[str, str] | None = None, bits: Sequence[int] | None = None) -> Layers:
    """The same layers, with fewer choices.

    >>> restrict(layers, {"first": "8/8", "last": "8/8", "head.*": "4/8"}, [2, 4, 8])  # doctest: +SKIP

    :param fix: weight and activation bits of the layers that are fixed, by name (``*`` for any part), "first" or "last"; None fixes
        the first and the last layer at 8 bits, an empty dictionary nothing
    :param bits: the bit-widths that there are; None for 2 to 8
    :raises ArqError: for a name that no layer has, for bits that are not there, and when nothing is left to choose
    """
    restricted = Layers(layers, layers.kept, layers.operators)
    if bits is not None:
        if not isinstance(bits, list | tuple) or not bits or any(type(b) is not int or b not in Layers.widths for b in bits):
            raise ArqError(f"bits is {shown(bits)}: give a list of whole numbers from {MIN_BITS} to {MAX_BITS}")
        restricted.widths = tuple(sorted(set(bits)))
    if fix is not None:
        restricted.fixed = _fixed(layers, fix)
    for name, pair in fixed_layers(restricted).items():
        if not {*pair} <= {*restricted.widths}:
            most, there = restricted.widths[-1], ", ".join(map(str, restricted.widths))
            raise ArqError(
                f"layer {name!r} is fixed at {pair.weight}/{pair.activation}, and there are {there} bits: fix it at these, such "
                f"as fix={{'first': '{most}/{most}', 'last': '{most}/{most}'}}"
            )
    if not free_layers(restricted):
        raise ArqError("every layer is fixed, which leaves nothing to choose: fix fewer")
    return restricted


def _fixed(layers: Layers, fix: Any) -> dict[str, tuple[int, int]]:
    """Layer name to bits, of names with ``*`` and bits as text."""
    if not isinstance(fix, Mapping) or not all(isinstance(name, str) for name in fix):
        raise ArqError(f"fix is {shown(fix)}: give a dictionary, such as {{'first': '8/8', 'last': '8/8'}}")
    ends = {"first": layers[0].name, "last": layers[-1].name}
    found: dict[str, tuple[Bits, str]] = {}
    for pattern, text in fix.items():
        pair = PAIR.fullmatch(text) if isinstance(text, str) else None
        if pair is None:
            raise ArqError(
                f"fix has {shown(text)} for {shown(pattern)}: give weight and activation bits from 2/2 to 8/8, such as '4/8'"
            )
        names = [layer.name for layer in layers if fnmatchcase(layer.name, pattern)]
        if pattern in ends and names not in ([], [ends[pattern]]):
            raise ArqError(f"fix names {pattern!r}, which is a layer, too: write '[{pattern[0]}]{pattern[1:]}' for that layer")
        names = [ends[pattern]] if pattern in ends else names
        if not names:
            raise ArqError(
                f"fix names {shown(pattern)}, and no layer is called so: choose of {', '.join(a.name for a in layers)[:500]}"
            )
        bits = Bits(*map(int, pair.groups()))
        for name in names:
            other, by = found.setdefault(name, (bits, pattern))
            if other != bits:
                raise ArqError(f"fix has two values for layer {name!r}, by {by!r} and by {pattern!r}: give one")
    for layer in layers:
        if layer.name in found and layer.tied_to is not None and layer.tied_to not in found:
            raise ArqError(f"layers {layer.tied_to!r} and {layer.name!r} read the same tensor: fix both, or the first alone")
        if {layer.name, layer.tied_to} <= {*found} and found[layer.name][0].activation != found[layer.tied_to or ""][0].activation:
            raise ArqError(
                f"layers {layer.tied_to!r} and {layer.name!r} read the same tensor: fix both at the same activation bits"
            )
    return {layer.name: found[layer.name][0] for layer in layers if layer.name in found}


def complete(chosen: BitWidthMap, layers: tuple[Layer, ...]) -> BitWidthMap:
    """Add those that are fixed to the bits of the free layers, in the order of ``layers``; a free layer left out gets 8 bits.

    A layer that reads the same tensor as an earlier one gets that one's activation bits.
    """
    given = fixed_layers(layers) | chosen
    bit_widths: BitWidthMap = {}
    for layer in layers:
        bits = given.get(layer.name, Bits(MAX_BITS, MAX_BITS))
        bit_widths[layer.name] = bits if layer.tied_to is None else bits._replace(activation=bit_widths[layer.tied_to].activation)
    return bit_widths


def uniform(layers: tuple[Layer, ...], weight: int, activation: int) -> BitWidthMap:
    """The same bits for every free layer."""
    return complete({layer.name: Bits(weight, activation) for layer in free_layers(layers)}, layers)


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


def is_choice(bit_widths: BitWidthMap, layers: tuple[Layer, ...]) -> bool:
    """Whether a map has only bits that there are, and those that are fixed."""
    free = {layer.name: bit_widths[layer.name] for layer in free_layers(layers)}
    return complete(free, layers) == bit_widths and {bits for pair in free.values() for bits in pair} <= {*widths_of(layers)}


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
