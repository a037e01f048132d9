"""What a run folder holds, for its report: read as it is, and nothing made up for what is not there."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from arq_env.bitwidths import FORMAT
from arq_env.certification import Certificates, smoothing_radius
from arq_env.comparison import FP32, paired_difference, paired_ratio, standard_error
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import read_json
from arq_env.support.settings import UNIFORM

#: What the network of a folder of ``finalize.py`` is called, beside those that the search certified.
FINAL = "final"
#: The network of a map that was fine-tuned after the search, and the folder of what belongs to it.
FINISHED = "finished"
#: What two tables of certificates must share to be compared image by image.
_SHARED = ("sigma", "n0", "n", "alpha", "seed", "images", "labels", "method")
_TABLE = re.compile(r"(?P<name>.+)-[0-9a-f]{12}\.tsv")


class Tried(Protocol):
    """One episode of a search, as :class:`arq_agents.trace.Episode` has it."""

    @property
    def episode(self) -> int: ...
    @property
    def reward(self) -> float: ...
    @property
    def bops_fraction(self) -> float: ...
    @property
    def acr(self) -> float: ...
    @property
    def reference_acr(self) -> float: ...
    @property
    def evaluation_seconds(self) -> float: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True)
class Certified:
    """One network's certificates, or what is left of them.

    :param name: FP32, bits such as W4A4, "found", "finished" (briefly, after the search), "final" (by ``finalize.py``)
    :param settings: what its certificates were made with; those with the same are on the same images and noise
    :param table: image by image; None where only ``figures`` were kept
    :param figures: ACR, its standard error, accuracies, BOPs fraction, bytes: what there is of them
    :param images: which test images: every so many-th, and the index of the first
    """

    name: str
    settings: dict
    images: tuple[int, int]
    table: Certificates | None
    figures: dict

    def paired_with(self, other: "Certified") -> bool:
        """Whether the two can be compared image by image."""
        return self._tables(other) is not None

    def difference(self, other: "Certified") -> tuple[float, float] | None:
        """This ACR minus the other, paired, and its standard error; None where they cannot be compared image by image."""
        return None if (tables := self._tables(other)) is None else paired_difference(*tables)

    def ratio(self, other: "Certified") -> tuple[float, float] | None:
        """This ACR over the other, paired, and its standard error; None likewise."""
        return None if (tables := self._tables(other)) is None else paired_ratio(*tables)

    def _tables(self, other: "Certified") -> tuple[Certificates, Certificates] | None:
        """Both tables, where they are on the same images and noise."""
        if self.table is None or other.table is None or self.settings != other.settings:
            return None
        return self.table, other.table

    @property
    def curve(self) -> list[tuple[float, float]]:
        """Radius and certified accuracy, from a table at 100 radii, else in the steps that were kept; at 0 clean accuracy."""
        reach = float(smoothing_radius(self.settings["sigma"], self.settings["alpha"] ** (1 / self.settings["n"])))
        if self.table is not None:
            radii = [*(reach * step / 99 for step in range(100)), reach + 1e-4]  # beyond which these samples certify nothing
            return [(radius, self.table.certified_accuracy(radius)) for radius in radii]
        kept = ((float(radius), share) for radius, share in self.figures["certified_accuracy"].items())
        return [(0.0, self.figures["clean_accuracy"]), *((radius, share) for radius, share in kept if radius <= reach)]


@dataclass(frozen=True)
class Run:
    """What one folder holds.

    :param name: the folder's; of one called "final" with that above it
    :param header: network, dataset, sigma, training, budget: what there is of them
    :param config: ``config.json`` of the search, empty without one
    :param layers: of the map's file: name, bits, MACs and parameters of each
    :param metrics: of the map's file
    :param networks: FP32 first, the one that the folder is about last
    :param differences: paired, as ``certificates.json`` states them: "found - FP32" to ``mean`` and ``standard_error``
    :param notes: a sentence for each thing in the folder that is not shown, and why
    """

    name: str
    header: dict
    config: dict = field(default_factory=dict)
    layers: list[dict] = field(default_factory=list)
    metrics: dict = field(default_factory=dict)
    episodes: Sequence[Tried] = ()
    networks: list[Certified] = field(default_factory=list)
    bops_fraction: float | None = None
    differences: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def limits(self) -> dict[str, float]:
        """What the budget allows: ``bops``, a fraction of FP32's, ``bytes``, ``milliseconds``; empty where none is named."""
        budget = self.header.get("budget", {})
        given = budget.items() if isinstance(budget, dict) else [("bops", budget)]
        return dict(("milliseconds", limit["milliseconds"]) if isinstance(limit, dict) else (kind, limit) for kind, limit in given)

    @property
    def own(self) -> Certified | None:
        """The network that the folder is about: the finished one, else the found one; None where neither is certified."""
        last = self.networks[-1] if self.networks else None
        return None if last is None or last.name == FP32 and self.layers else last

    @property
    def base(self) -> Certified | None:
        """The uniform network that others are compared with, else FP32; None where there is neither."""
        uniform = [network for network in self.networks[:-1] if UNIFORM.fullmatch(network.name)]
        return uniform[0] if uniform else self.networks[0] if len(self.networks) > 1 else None


def read_run(folder: Path, episodes: Sequence[Tried] = ()) -> Run:
    """Read a run folder of a search, or a folder of ``finalize.py``.

    :param episodes: of its trace, which whoever knows searches has read
    :raises ArqError: when it holds nothing to report, or a file in it that cannot be read
    """
    folder = Path(folder)
    notes: list[str] = []
    config = _json(folder / "config.json", dict)
    document = _json(folder / "bit_widths.json", _map)
    networks = _certified(folder, notes)
    if not (config or document or networks or episodes):
        raise ArqError(f"{folder} holds nothing to report: give the run folder of a search, or a folder that finalize.py wrote")
    summary = max(
        ((n.figures for n in networks if "network" in n.figures)), key=lambda figures: figures["settings"]["n"], default={}
    )
    header = {key: config[key] for key in ("sigma", "budget") if key in config}
    for known in (summary, document.get("provenance", {}), document):
        header |= {key: known[key] for key in ("network", "dataset", "sigma", "training", "budget") if known.get(key) is not None}
    whole = folder.resolve()
    return Run(
        f"{whole.parent.name}/{whole.name}" if whole.name == FINAL else whole.name,
        header,
        config,
        document.get("layers", []),
        document.get("metrics", {}),
        episodes,
        networks,
        document.get("bops_fraction", summary.get("bops_fraction")),
        _json(folder / "certificates.json", _comparison).get("acr_differences", {}),
        notes,
    )


def _json(path: Path, check: Callable[[dict], Any]) -> dict:
    """A JSON object; an empty one where there is no such file.

    :raises ArqError: when it cannot be read, or is not what ``check`` takes
    """
    if not path.exists():
        return {}
    try:
        document = read_json(path)
        check(document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArqError(f"{path} cannot be read ({reason(error)}): restore it, or remove it to report on the rest") from error
    return document


def _map(document: dict) -> None:
    """Raise unless this is a map's file with what a report shows of it."""
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}")
    for layer in document["layers"]:
        numbers = [layer[key] for key in ("weight_bits", "activation_bits", "macs", "parameters")]
        if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(layer["name"], str):
            raise ValueError(f"it has a layer {layer!r}")
    float(document["bops_fraction"]), dict(document.get("metrics", {})), dict(document.get("provenance", {}))


def _figures(document: dict) -> None:
    """Raise unless these are one network's figures."""
    float(document["acr"]), float(document["acr_standard_error"]), float(document["clean_accuracy"])
    for radius, share in document["certified_accuracy"].items():
        float(radius), float(share)


def _comparison(document: dict) -> None:
    """Raise unless this is a document of :class:`arq_env.comparison.Comparison`."""
    _summed(document)
    for figures in document["networks"].values():
        _figures(figures)
    for difference in document["acr_differences"].values():
        float(difference["mean"]), float(difference["standard_error"])


def _summary(document: dict) -> None:
    """Raise unless this is a document of ``finalize.py``."""
    _figures(document)
    _summed(document)
    str(document["map"])


def _summed(document: dict) -> None:
    """Raise unless it says what its certificates were made with."""
    settings = document["settings"]
    float(settings["alpha"]), float(document["sigma"]), int(document["images"])
    int(settings["n"]), int(settings["every"]), int(settings["offset"])


def _certified(folder: Path, notes: list[str]) -> list[Certified]:
    networks = _of_comparison(folder, notes)
    for final in (folder, folder / "final"):
        for path in sorted(final.glob("summary-n*.json")):
            figures = _json(path, _summary)
            table = path.with_name(path.name.replace("summary", "certificates")).with_suffix(".tsv")
            name = FP32 if figures["map"] == FP32 else FINAL
            chosen = figures["settings"]["every"], figures["settings"]["offset"]
            if table.exists():
                networks.append(Certified(name, _settings(table), chosen, Certificates.from_tsv(table), figures))
            else:
                networks.append(Certified(name, figures["settings"] | {"sigma": figures["sigma"]}, chosen, None, figures))
    finals = [network for network in networks if network.name == FINAL]
    if len(finals) > 1:  # of several certificates of one network that with which the others can be compared, else the tightest
        others = [network for network in networks if network.name != FINAL]
        finals.sort(key=lambda network: (any(network.paired_with(other) for other in others), network.settings["n"]))
        notes.append(f"final holds {len(finals)} certificates of the finished network; shown is n = {finals[-1].settings['n']:,}.")
        networks = [*others, finals[-1]]
    return networks


def _of_comparison(folder: Path, notes: list[str]) -> list[Certified]:
    """What ``certificates.json`` states, with the tables in ``certificates/`` that it was computed from."""
    stated, networks = _json(folder / "certificates.json", _comparison), []
    paths = [*sorted((folder / "certificates").glob("*.tsv")), *sorted((folder / FINISHED).glob("*.tsv"))]
    tables = {path: Certificates.from_tsv(path) for path in paths if _rows(path)}
    if tables and not stated:
        notes.append(
            "certificates/ holds tables and there is no certificates.json that says whose: run the search's command again."
        )
    for name, figures in stated.get("networks", {}).items():
        kept = stated["settings"] | {"sigma": stated["sigma"], "images": stated["images"]}
        chosen = kept["every"], kept["offset"]
        network = Certified(name, kept, chosen, None, figures)
        for path, table in tables.items():
            match = _TABLE.fullmatch(path.name)
            of = FINISHED if path.parent.name == FINISHED else match and match["name"]
            if of == name and len(table) == stated["images"] and abs(table.acr - figures["acr"]) < 1e-9:
                network = Certified(name, _settings(path), chosen, table, figures)
        networks.append(network)
    if without := [network.name for network in networks if network.table is None]:
        notes.append(
            f"Certificates image by image are not in the folder for {', '.join(without)}, only their sums in certificates.json."
        )
    return networks


def _rows(path: Path) -> bool:
    """Whether a table holds a row; one that was begun and killed may not."""
    return path.read_bytes().count(b"\n") > 1


def _settings(table: Path) -> dict:
    """What a table's certificates were made with."""
    beside = table.with_name(table.name + ".settings.json")
    document = _json(beside, lambda d: (float(d["sigma"]), int(d["n"]), float(d["alpha"]), str(d["images"])))
    if not document:
        raise ArqError(f"{beside} is missing, which says what {table.name} is of: restore it, or remove the table")
    return {key: document.get(key) for key in _SHARED}


def figures_of(network: Certified) -> dict:
    """ACR, its standard error and clean accuracy, from the table where there is one."""
    if network.table is None:
        return {key: network.figures[key] for key in ("acr", "acr_standard_error", "clean_accuracy")}
    table = network.table
    return {
        "acr": table.acr,
        "acr_standard_error": standard_error(table.certified_radius),
        "clean_accuracy": table.clean_accuracy,
    }
