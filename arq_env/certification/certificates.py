"""A table of certificates, one image a row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from arq_env.errors import ArqError
from arq_env.files import atomic_file

ABSTAINED = -1
_COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")


@dataclass(frozen=True)
class Certificates:
    """What was certified, for each image.

    :param label: int64 [images]
    :param prediction: int64 [images], -1 where the smoothed classifier abstained
    :param radius: float64 [images], L2 in units of pixels in [0, 1], around the prediction; 0 where it abstained
    :param n: int64 [images], noise samples that were counted
    :param seconds: float64 [images]
    """

    label: np.ndarray
    prediction: np.ndarray
    radius: np.ndarray
    n: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    @property
    def correct(self) -> np.ndarray:
        """bool [images]: predicted, and rightly."""
        return self.prediction == self.label

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
        lines = ["\t".join(_COLUMNS)]
        rows = zip(self.label, self.prediction, self.radius, self.correct, self.seconds, strict=True)
        for index, (label, prediction, radius, correct, seconds) in enumerate(rows):
            lines.append(f"{index}\t{label}\t{prediction}\t{float(radius)!r}\t{int(correct)}\t{seconds:.4f}")
        with atomic_file(path) as file:
            file.write(("\n".join(lines) + "\n").encode())

    @classmethod
    def from_tsv(cls, path: Path) -> "Certificates":
        """Read such a log; ``n`` is not among its columns and comes back as 0, seconds as written.

        :raises ArqError: when the file is missing or not such a table
        """
        try:
            header, *lines = Path(path).read_text().splitlines()
            if tuple(header.split("\t")) != _COLUMNS:
                raise ValueError(f"the header is {header[:60]!r}")
            rows = [line.split("\t") for line in lines]
            label, prediction = (np.array([int(row[i]) for row in rows], np.int64) for i in (1, 2))
            radius = np.array([float(row[3]) for row in rows])
            seconds = np.array([_seconds(row[5]) for row in rows])
        except (OSError, ValueError, IndexError) as error:
            raise ArqError(f"{path} is not a certification log ({error}): it needs the columns {', '.join(_COLUMNS)}") from error
        return cls(label, prediction, radius, np.zeros_like(label), seconds)


def _seconds(text: str) -> float:
    """Seconds, or the h:mm:ss.ffffff that published logs hold."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total
