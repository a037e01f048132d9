"""What a page is made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from arq_env.datasets import Dataset

#: Returns a data set by its name, or raises an ArqError that says why it cannot be had.
Datasets = Callable[[str], Dataset]


@dataclass
class Section:
    """A part of the page under a title: tiles, charts, pictures or a table; or one line that says why there is nothing to show.

    :param file: name of its PNG, without the ending
    :param charts: Altair's, one above the other
    :param tiles: ``name, value, more``, and ``share`` of a bar, in [0, 1]
    :param pictures: ``picture`` as a data URI, ``name, more, value``, and ``answers``, pairs of network and what it says
    :param wide: over the page's whole width
    :param folded: shown at a click
    """

    title: str
    file: str = ""
    caption: str = ""
    charts: list = field(default_factory=list)
    tiles: list[dict] = field(default_factory=list)
    pictures: list[dict] = field(default_factory=list)
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    missing: str = ""
    wide: bool = False
    folded: bool = False

    def with_table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> "Section":
        """The section with a table, without columns that hold nothing."""
        kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
        self.head, self.rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
        return self


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
