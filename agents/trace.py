"""The trace of a search: one line of JSON an episode, enough to draw its curve and to go on after a kill."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from arq_env.bitwidths import Bits, BitWidthMap
from arq_env.errors import ArqError
from arq_env.evaluation import Evaluation


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
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(episode)) + "\n")
    except OSError as error:
        raise ArqError(f"cannot write {path} ({error.strerror}): free some space there; the same command then goes on") from error


def count_episodes(path: Path) -> int:
    """How many episodes a trace holds, without reading what they found."""
    return _read(path).count(b"\n")


def _read(path: Path) -> bytes:
    """All of a trace, nothing where there is none.

    :raises ArqError: when it cannot be read
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ArqError(f"{path} cannot be read ({error.strerror}): choose another --output") from error


def read_trace(path: Path) -> list[Episode]:
    """Read a trace; a last line that a kill cut short is left out.

    :raises ArqError: when another line cannot be read
    """
    episodes = []
    lines = _read(path).decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            fields = json.loads(line)
            fields["bit_widths"] = {name: Bits(*bits) for name, bits in fields["bit_widths"].items()}
            episodes.append(Episode(**fields))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ArqError(
                f"{path} line {number} is not an episode ({error}): delete the run folder or choose another --output"
            ) from error
    return episodes
