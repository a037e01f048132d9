"""A table of certificates, one image a row."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arq_env.errors import ArqError
from arq_env.files import atomic_file, write_json

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

        :raises ArqError: when the file is missing or not such a table
        """
        try:
            index, columns = _read(Path(path).read_text())
            if len(set(index)) < len(index):
                raise ValueError("an idx is there twice")
            order = np.argsort(index)
            return cls(**{name: column[order] for name, column in columns.items()})
        except (OSError, ValueError, IndexError) as error:
            raise ArqError(
                f"{path} is not a whole certification log ({error}): it needs the columns {', '.join(_COLUMNS)}, and an idx once"
            ) from error


class CertificateLog:
    """Certificates as they are made, appended to a file every few images, so that a killed certification goes on.

    The file has the columns of published logs, then n and draw. A JSON file beside it says what it belongs to.

    :param path: TSV file; None to keep the table in memory only
    :param identity: returns what the certificates depend on, as plain data
    :raises ArqError: when the file belongs to something else
    """

    def __init__(self, path: Path | None, identity: Callable[[], dict]):
        self._path, self._rows = path and Path(path), {}
        if self._path is None:
            return
        beside, now = self._path.with_name(self._path.name + ".settings.json"), identity()
        if not self._path.exists():
            write_json(beside, now)
            with atomic_file(self._path) as file:
                file.write(("\t".join((*_COLUMNS, *_MORE)) + "\n").encode())
            return
        try:
            whole = self._path.read_text()
            whole = whole[: whole.rindex("\n") + 1]  # a kill may have cut the last line
            index, columns = _read(whole)
            before = json.loads(beside.read_text())
        except (OSError, ValueError, IndexError) as error:
            raise ArqError(f"{path} cannot be gone on with ({error}): remove it, or choose another file") from error
        if different := [name for name in now | before if before.get(name) != now.get(name)]:
            raise ArqError(f"{path} holds certificates made with another {', '.join(different)}: choose another file for these")
        os.truncate(self._path, len(whole.encode()))
        self._rows = {int(i): row for i, row in zip(index, zip(*columns.values(), strict=True), strict=True)}

    @property
    def done(self) -> list[int]:
        """Indices of the images that are in the table."""
        return sorted(self._rows)

    def append(self, rows, label, prediction, radius, n, draw, seconds) -> None:
        """Add the images ``rows``, and write them down before this returns."""
        columns = (label, prediction, radius, n, seconds, draw)
        added = dict(zip((int(row) for row in rows), zip(*columns, strict=True), strict=True))
        self._rows |= added
        if self._path is not None:
            with open(self._path, "a", encoding="utf-8") as file:
                for index, (of, said, r, count, time, w) in added.items():
                    file.write(_line(index, of, said, r, time) + f"\t{count}\t{float(w)!r}\n")

    def certificates(self) -> Certificates:
        """The whole table, in the order of the images."""
        ordered = (self._rows[index] for index in self.done)
        return Certificates(*(np.array(column) for column in zip(*ordered, strict=True)))


def _line(index, label, prediction, radius, seconds) -> str:
    return f"{index}\t{label}\t{prediction}\t{float(radius)!r}\t{int(label == prediction)}\t{seconds:.4f}"


def _read(text: str) -> tuple[list[int], dict[str, np.ndarray]]:
    """Indices of a log's images, and its columns in the order of a Certificates' fields."""
    header, *lines = text.splitlines()
    names = header.split("\t")
    if tuple(names[: len(_COLUMNS)]) != _COLUMNS:
        raise ValueError(f"the header is {header[:60]!r}")
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    return [int(row["idx"]) for row in rows], {
        "label": np.array([int(row["label"]) for row in rows], np.int64),
        "prediction": np.array([int(row["predict"]) for row in rows], np.int64),
        "radius": np.array([float(row["radius"]) for row in rows]),
        "n": np.array([int(row.get("n", 0)) for row in rows], np.int64),
        "seconds": np.array([_seconds(row["time"]) for row in rows]),
        "draw": np.array([float(row.get("draw", "nan")) for row in rows]),
    }


def _seconds(text: str) -> float:
    """Seconds, or the h:mm:ss.ffffff that published logs hold."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total
