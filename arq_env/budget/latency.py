"""Milliseconds, from a table that was measured on a device."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from arq_env.bitwidths import PAIR, Bits
from arq_env.budget.base import BudgetSpec, OneBudget, is_number, positive
from arq_env.layers import Layer
from arq_env.support.errors import ArqError, reason, shown
from arq_env.support.files import parse_json, sha256

if TYPE_CHECKING:
    from arq_env.problem import Problem

NANOSECONDS = 10**6


class LatencyBudget(OneBudget):
    """A limit on the time for one image, in milliseconds, by a JSON file such as

    ``{"layers": {"conv1": {"4/4": 0.11, "4/8": 0.15, "8/8": 0.2}, ...}, "beside": 0.05}``

    that holds the time of each layer for the pairs of weight and activation bits that the device has kernels for, and of all else.
    Fewer bits run in the next wider kernel that is fastest: what is not listed takes the least time of the pairs that are no
    smaller. "8/8" must be there.

    :param most: milliseconds, positive
    :param table: path of the file
    :param digest: SHA-256 that it must have, if any
    :raises ArqError: naming the row, when one is missing or is none; when it is a table for another network
    """

    name, unit = "latency", "ms"

    def __init__(self, layers: tuple[Layer, ...], most: float, *, table: str | Path, digest: str | None = None):
        self.table, self.digest, self._times, beside = _read(Path(table), digest, layers)
        super().__init__(layers, most, units=NANOSECONDS, constant=beside)

    @classmethod
    def of(cls, problem: "Problem", value: Any, layers: tuple[Layer, ...]) -> Self:
        wanted = {"milliseconds", "table"}
        if not isinstance(value, Mapping) or not wanted <= set(value) <= wanted | {"sha256"}:
            raise ArqError(f"the latency budget is {shown(value)}: give {{'milliseconds': 3.0, 'table': 'times.json'}}")
        if not isinstance(value["table"], str | Path):
            raise ArqError(f"the table of latencies is {shown(value['table'])}: give the path of a JSON file")
        return cls(layers, value["milliseconds"], table=value["table"], digest=value.get("sha256"))

    @property
    def spec(self) -> BudgetSpec:
        return {self.name: {"milliseconds": self.value, "table": str(self.table), "sha256": self.digest}}

    def checked(self, value: Any) -> float:
        return positive(value, self.unit)

    def layer_cost(self, layer: Layer, weight: int, activation: int) -> int:
        return min(time for (w, a), time in self._times[layer.name].items() if w >= weight and a >= activation)


def _read(path: Path, digest: str | None, layers: tuple[Layer, ...]) -> tuple[Path, str, dict[str, dict[Bits, int]], int]:
    """Path, SHA-256, layer name to bits to nanoseconds, and nanoseconds beside the layers."""
    try:
        content = path.read_bytes()
        document = parse_json(content)
        rows, beside = document["layers"], document.get("beside", 0)
        listed = {name: row | {} for name, row in rows.items()}  # a TypeError unless it is a dictionary
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(f"{path} cannot be read as a table of latencies ({reason(error)}): it needs layers") from error
    found = sha256(content)
    if digest not in (None, found):
        raise ArqError(f"{path} is another table than the budget was made with: restore it, or search again")
    for name in listed.keys() ^ {layer.name for layer in layers}:
        what = "names a layer that the network does not have" if name in listed else "has no row for layer"
        raise ArqError(f"{path} {what}, {name!r}: measure this network's {len(layers)} layers")
    times: dict[str, dict[Bits, int]] = {}
    for name, row in listed.items():
        for pair, time in (row | {"beside": beside}).items():
            if not (is_number(time) and 0 <= time < 1e9):
                raise ArqError(f"{path} has time {time!r} for {name!r}, {pair}: give milliseconds")
        wrong = [pair for pair in row if not PAIR.fullmatch(pair)]
        if wrong or "8/8" not in row:
            told = f"has {wrong[0]!r}" if wrong else "lacks '8/8'"
            raise ArqError(f"{path} {told} for layer {name!r}: give pairs of bits from 2/2 to 8/8, the last one always")
        times[name] = {Bits(*map(int, pair.split("/"))): round(time * NANOSECONDS) for pair, time in row.items()}
    return path, found, times, round(beside * NANOSECONDS)
