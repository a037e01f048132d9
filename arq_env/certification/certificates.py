"""A table of certificates, one image a row."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arq_env.support.errors import ArqError
from arq_env.support.files import atomic_file, checked_path, write_json

ABSTAINED = -1
_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
_MORE = ("n", "draw")  # of the logs that certify writes, after the published columns


@dataclass(frozen=True)
class Certificates:
    """What was certified, for each image.

    :param label: int64 [images], -1 where unknown
    :param prediction: int64 [images], -1 where the smoothed classifier abstained
    :param radius: float64 [images], L2 in units of pixels in [0, 1], around the prediction; 0 where it abstained
    :param n: int64 [images], noise samples that were drawn after the n0 of the selection
    :param seconds: float64 [images]
    :param draw: float64 [images], the uniform draw of a randomized bound (raised to 2 alpha where below), NaN without one
    """

    label: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    n: np.ndarray
    seconds: np.ndarray
    draw: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """bool [images]: predicted, and rightly."""
        return (self.prediction == self.label) & (self.prediction != ABSTAINED)

    @property
    def certified_radius(self) -> np.ndarray:
        """float64 [images]: the radius where the prediction is right, else 0."""
        return np.where(self.correct, self.radius, 0.0)

    @property
    def acr(self) -> float:
        """Average certified radius: the mean of :attr:`certified_radius`."""
        return float(self.certified_radius.mean())

    @property
    def clean_accuracy(self) -> float:
        """Share of images the smoothed classifier predicts rightly; abstaining counts as wrong."""
        return float(self.correct.mean())

    def certified_accuracy(self, radius: float) -> float:
        """Share of images predicted rightly with at least this radius."""
        return float((self.correct & (self.radius >= radius)).mean())

    def to_tsv(self, path: Path) -> None:
        """Write the columns of published certification logs: idx (the row), label, predict, radius, correct, time."""
        rows = zip(self.label, self.prediction, self.radius, self.seconds, strict=True)
        lines = [_line(index, *row) for index, row in enumerate(rows)]
        with atomic_file(path) as file:
            file.write(("\n".join(["\t".join(_COLUMNS), *lines]) + "\n").encode())

    @classmethod
    def from_tsv(cls, path: Path) -> "Certificates":
        """Read such a log, or one that ``certify`` wrote, in the order of idx; without a column ``n`` it comes back as 0.

        Blank lines, a byte-order mark, any line ends and further headers (of logs that were joined) are read over.

        :raises ArqError: when the file is missing, empty or not such a table, or says what cannot be (a radius below 0,
            ``correct`` against label and prediction)
        """
        path = checked_path("path", path)
        try:
            index, columns = _read(path.read_bytes())
            if not index:
                raise ValueError("it holds no image")
            order = np.argsort(index)
            return cls(**{name: column[order] for name, column in columns.items()})
        except (OSError, ValueError, OverflowError) as error:
            raise ArqError(
                f"{path} is not a whole certification log ({error}): it needs the columns {', '.join(_COLUMNS)}, and an idx once"
            ) from error


class CertificateLog:
    """Certificates as they are made, appended to a file every few images, so that a killed certification goes on.

    The file has the columns of published logs, then n and draw. A JSON file beside it says what it belongs to.

    :param path: TSV file; None to keep the table in memory only
    :param labels: int64 [images], of the images that it is for
    :param identity: returns what the certificates depend on, as plain data
    :raises ArqError: when the file belongs to something else, or cannot be read or written
    """

    def __init__(self, path: Path | None, labels: np.ndarray, identity: Callable[[], dict]):
        self._path = path
        self._rows: dict[int, tuple] = {}
        if path is None:
            return
        beside, now = path.with_name(path.name + ".settings.json"), identity()
        try:
            if not path.exists():
                write_json(beside, now)
                with atomic_file(path) as file:
                    file.write(("\t".join((*_COLUMNS, *_MORE)) + "\n").encode())
                return
            whole = path.read_bytes()
            whole = whole[: whole.rindex(b"\n") + 1]  # a kill may have cut the last line
            index, columns = _read(whole)
            if any(not 0 <= i < len(labels) or label != labels[i] for i, label in zip(index, columns["label"], strict=True)):
                raise ValueError("some of its rows are not of these images")
            before = json.loads(beside.read_text(encoding="utf-8-sig"))
            if not isinstance(before, dict):
                raise ValueError(f"{beside.name} is damaged")
            if different := [name for name in now | before if before.get(name) != now.get(name)]:
                raise ArqError(f"{path} holds certificates made with another {', '.join(different)}: choose another file for these")
            os.truncate(path, len(whole))
        except ArqError:
            raise
        except (OSError, ValueError, OverflowError, RecursionError) as error:
            raise ArqError(f"{path} cannot be gone on with ({error}): remove it, or choose another file") from error
        self._rows = dict(zip(index, zip(*columns.values(), strict=True), strict=True))

    @property
    def done(self) -> list[int]:
        """Indices of the images that are in the table."""
        return sorted(self._rows)

    def append(self, rows, label, prediction, radius, n, draw, seconds) -> None:
        """Add the images ``rows``, and write them down before this returns.

        :raises ArqError: when they cannot be written; what was written before stays, to be gone on with
        """
        columns = (label, prediction, radius, n, seconds, draw)
        added = dict(zip((int(row) for row in rows), zip(*columns, strict=True), strict=True))
        if self._path is not None:
            lines = [
                _line(index, of, said, r, time) + f"\t{count}\t{float(w)!r}\n"
                for index, (of, said, r, count, time, w) in added.items()
            ]
            try:
                with open(self._path, "a", encoding="utf-8", newline="\n") as file:
                    file.writelines(lines)
            except OSError as error:
                raise ArqError(
                    f"cannot write {self._path} ({error.strerror or error}): the images in it are kept, so free some space there, "
                    "and the same call goes on"
                ) from error
        self._rows |= added

    def certificates(self) -> Certificates:
        """The whole table, in the order of the images."""
        ordered = (self._rows[index] for index in self.done)
        return Certificates(*(np.array(column) for column in zip(*ordered, strict=True)))


def _line(index, label, prediction, radius, seconds) -> str:
    right = int(label == prediction != ABSTAINED)
    return f"{index}\t{label}\t{prediction}\t{float(radius)!r}\t{right}\t{seconds:.4f}"


def _read(data: bytes) -> tuple[list[int], dict[str, np.ndarray]]:
    """Indices of a log's images, and its columns in the order of a Certificates' fields.

    :raises ValueError: that says which line is wrong
    """
    names, rows = None, {}
    for number, line in enumerate(data.decode("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if tuple(parts[: len(_COLUMNS)]) == _COLUMNS:  # again where logs were joined
            names = parts
            continue
        if names is None:
            raise ValueError(f"the header is {line[:60]!r}")
        if len(parts) != len(names):
            raise ValueError(f"line {number} has {len(parts)} columns of {len(names)}")
        try:
            index, row = _row(dict(zip(names, parts, strict=True)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if index in rows:
            raise ValueError(f"line {number}: idx {index} is there twice")
        rows[index] = row
    if names is None:
        raise ValueError("it has no header")
    kinds = {"label": np.int64, "prediction": np.int64, "radius": float, "n": np.int64, "seconds": float, "draw": float}
    return list(rows), {name: np.array([row[name] for row in rows.values()], kind) for name, kind in kinds.items()}


def _row(text: dict[str, str]) -> tuple[int, dict]:
    """One image's index and entries, checked."""
    index, label, prediction, correct, n = (int(text.get(key, 0)) for key in ("idx", "label", "predict", "correct", "n"))
    radius, seconds, draw = float(text["radius"]), _seconds(text["time"]), float(text.get("draw", "nan"))
    if min(index, n, label + 1, prediction + 1) < 0:
        raise ValueError("idx, label, predict or n is negative")
    if not (0 <= radius < math.inf and 0 <= seconds < math.inf):
        raise ValueError(f"radius {radius:g} or time {seconds:g} is negative, infinite or NaN")
    if not 0 <= draw <= 1 and not math.isnan(draw):
        raise ValueError(f"draw is {draw:g}")
    if correct != (label == prediction) and not (correct == 0 and prediction == ABSTAINED):
        raise ValueError(f"correct is {correct} for label {label} and prediction {prediction}")
    return index, {"label": label, "prediction": prediction, "radius": radius, "n": n, "seconds": seconds, "draw": draw}


def _seconds(text: str) -> float:
    """Seconds, or the h:mm:ss.ffffff, with "1 day, " before it, that published logs hold."""
    days, _, clock = text.rpartition(", ")
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total + (86_400 * int(days.removesuffix("s").removesuffix(" day")) if days else 0)
