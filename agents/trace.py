"""The trace of a search: one line of JSON an episode, enough to draw its curve and to go on after a kill."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from arq_env.bitwidths import MAX_BITS, MIN_BITS, Bits, BitWidthMap
from arq_env.evaluation import Evaluation
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import parse_json


@dataclass(frozen=True)
class Episode:
    """What one episode found.

    :param bit_widths: layer name to (weight bits, activation bits)
    :param evaluations: distinct maps evaluated so far, this one included
    :param evaluation_seconds: that the map's evaluation took when it was made
    :param seconds: since the search began, without the time between a kill and its resumption
    """

    episode: int
    reward: float
    bit_widths: BitWidthMap
    bops_fraction: float
    acr: float
    clean_accuracy: float
    certified_accuracy: float
    reference_acr: float
    evaluation_seconds: float
    evaluations: int
    seconds: float

    def same_outcome(self, other: "Episode") -> bool:
        """Whether both found the same map with the same reward, whatever time it took."""
        names = ("episode", "reward", "bit_widths", "reference_acr", "evaluations")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    @property
    def evaluation(self) -> Evaluation:
        """The map's evaluation, for :meth:`arq_env.evaluation.Evaluator.remember`."""
        return Evaluation(self.acr, self.clean_accuracy, self.certified_accuracy, self.evaluation_seconds)


def append_episode(path: Path, episode: Episode) -> None:
    """Add one line to the trace."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(asdict(episode)) + "\n")
    except OSError as error:
        raise ArqError(f"cannot write {path} ({error.strerror}): free some space there; the same command then goes on") from error


def count_episodes(path: Path) -> int:
    """How many episodes a trace holds, without reading what they found.

    :raises ArqError: when it cannot be read
    """
    return _read(path).count(b"\n")


def read_trace(path: Path) -> list[Episode]:
    """Read a trace; a last line that a kill cut short is left out.

    :raises ArqError: when it cannot be read, or another line is not an episode
    """
    episodes = []
    for number, line in enumerate(_read(path).split(b"\n")[:-1], start=1):
        try:
            episodes.append(_episode(parse_json(line)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ArqError(
                f"{path} line {number} is not an episode ({reason(error)}): delete the run folder or choose another --output"
            ) from error
    return episodes


def _read(path: Path) -> bytes:
    """What is in the file; nothing where there is none."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArqError(f"{path} cannot be read ({error.strerror}): delete the run folder or choose another --output") from error


def _episode(entries: dict) -> Episode:
    """The episode of a line; each entry must be of its field's type, numbers finite and bits those of a map.

    :raises ValueError, TypeError, AttributeError, OverflowError: when they are not
    """
    bit_widths = {}
    for name, bits in entries.pop("bit_widths").items():
        if (
            not isinstance(bits, list)
            or [type(bit) for bit in bits] != [int, int]
            or not MIN_BITS <= min(bits) <= max(bits) <= MAX_BITS
        ):
            raise ValueError(f"layer {name!r} has bits {bits!r}")
        bit_widths[name] = Bits(*bits)
    for field in fields(Episode):
        if field.name in entries:
            value, types = entries[field.name], (int,) if field.type is int else (int, float)
            if type(value) not in types or not math.isfinite(value):
                raise ValueError(f"{field.name} is {value!r}")
    return Episode(bit_widths=bit_widths, **entries)
