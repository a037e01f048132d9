"""Tables for the terminal: a map layer by layer, and networks side by side."""

import math

from arq_env.bitwidths import BitWidthMap
from arq_env.certification import smoothing_radius
from arq_env.comparison import Comparison, standard_error
from arq_env.layers import Layer


def layer_table(layers: tuple[Layer, ...], bit_widths: BitWidthMap) -> str:
    """One line a layer: name, shape, weight and activation bits, share of the map's BOPs."""
    costs = [layer.macs * bit_widths[layer.name].weight * bit_widths[layer.name].activation for layer in layers]
    rows = [("layer", "shape (in x out x kernel)", "weight bits", "activation bits", "share of BOPs")]
    for layer, cost in zip(layers, costs, strict=True):
        bits = bit_widths[layer.name]
        shape = f"{layer.in_channels} x {layer.out_channels} x {layer.kernel}"
        rows.append((layer.name, shape, str(bits.weight), str(bits.activation), f"{cost / sum(costs):.1%}"))
    return _table(rows)


def comparison_table(comparison: Comparison, sizes: dict[str, int] | None = None) -> str:
    """One line a network: ACR, clean accuracy, BOPs fraction, and the ACR's paired difference to the first map's.

    :param sizes: bytes of each, in a column of their own
    """
    base = next(iter(comparison.maps))
    size = () if sizes is None else ("bytes",)
    rows = [("network", "ACR", "clean accuracy", "BOPs of FP32", *size, f"ACR - {base} (paired)")]
    for name, table in comparison.certificates.items():
        difference, error = comparison.difference(name, base)
        rows.append(
            (
                name,
                f"{table.acr:.4f} +- {standard_error(table.certified_radius):.4f}",
                f"{table.clean_accuracy:.3f}",
                f"{comparison.bops_fraction(name):.3%}",
                *(() if sizes is None else (f"{sizes[name]:,}",)),
                "" if name == base else f"{difference:+.4f} +- {error:.4f}",
            )
        )
    return _table(rows)


#: Of networks, in sentences.
_CALLED = {"found": "the found map", "finished": "the found map, fine-tuned,", "final": "the finished network"}


def verdict(name: str, base: str, difference: float, error: float, cost: float = 1.0) -> str:
    """One sentence on a paired difference in ACR: is ``name`` ahead of ``base`` by more than two standard errors?

    :param cost: bit operations of ``base`` over those of ``name``; where they are more by a twentieth, another sentence says so
    """
    who = _CALLED.get(name, name)
    size = f"{difference:+.4f} in ACR, standard error {error:.4f}"
    if abs(difference) > 2 * error:
        told = f"{who} {'wins against' if difference > 0 else 'loses to'} {base} by more than two standard errors ({size})."
    else:
        told = f"{who} is not told apart from {base}: the difference is within two standard errors ({size})."
    told = told[0].upper() + told[1:]
    return told if cost <= 1.05 else f"{told} {base} makes {cost:.2f} times as many bit operations."


def reference_table(documents: list[dict]) -> str:
    """FP32 networks as a Markdown table, from the documents that ``experiments/studies/certify_checkpoints.py`` writes."""
    radii = [f"{step / 4:g}" for step in range(1, 10)]
    rows = [("data set", "sigma", "training", "n", "ACR", "clean accuracy", *(f"at {radius}" for radius in radii))]
    rows.append(("---",) * len(rows[0]))
    for d in sorted(documents, key=lambda d: (d["dataset"], d["sigma"], d["training"] == "consistency", d["settings"]["n"])):
        accuracies = (f"{d['certified_accuracy'][r]:.3f}" if float(r) <= _largest_radius(d) else "" for r in radii)
        acr = f"{d['acr']:.4f} +- {d['acr_standard_error']:.4f}"
        first = (d["dataset"], f"{d['sigma']:g}", d["training"], f"{d['settings']['n']:,}")
        rows.append((*first, acr, f"{d['clean_accuracy']:.3f}", *accuracies))
    return _markdown(rows)


def finals_table(rows: list[dict]) -> str:
    """Finished networks as a Markdown table, from the rows that ``experiments/studies/compare_finished.py`` writes."""
    reachable = max(_largest_radius(row) for row in rows)
    radii = [f"{step / 4:g}" for step in range(1, 13) if step / 4 <= reachable]
    head = ("base network", "map", "BOPs of FP32", "bytes", "ACR", "of FP32 as shipped", "of FP32 finished alike", "clean accuracy")
    table = [(*head, *(f"at {radius}" for radius in radii)), ("---",) * (len(head) + len(radii))]
    for row in rows:
        size = "" if row["model_bytes"] is None else f"{row['model_bytes']:,}"
        ratios = []
        for reference in ("shipped", "finished_alike"):
            one = row.get("against_fp32", {}).get(reference)
            ratios.append("" if one is None else _ratio(**one))
        accuracies = (f"{row['certified_accuracy'][r]:.3f}" if float(r) <= _largest_radius(row) else "" for r in radii)
        first = row["checkpoint"], row["map"], f"{row['bops_fraction']:.3%}", size, f"{row['acr']:.4f}"
        table.append((*first, *ratios, f"{row['clean_accuracy']:.3f}", *accuracies))
    return _markdown(table)


def _ratio(acr_ratio: float, acr_ratio_standard_error: float, acr_ratio_lower_bound: float, **_) -> str:
    if acr_ratio_standard_error == 0:  # with itself
        return f"{acr_ratio:.3f}"
    if not math.isfinite(acr_ratio_lower_bound):
        return f"{acr_ratio:.3f} +- {acr_ratio_standard_error:.3f}"
    bound = math.floor(1000 * acr_ratio_lower_bound) / 1000  # a bound is not rounded up
    return f"{acr_ratio:.3f} +- {acr_ratio_standard_error:.3f} (> {bound:.3f})"


def _largest_radius(document: dict) -> float:
    """The largest radius that this many samples can certify."""
    settings = document["settings"]
    return float(smoothing_radius(document["sigma"], settings["alpha"] ** (1 / settings["n"])))


def _markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _table(rows) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, *rest = (
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
    return "\n".join([first, "-" * len(first), *rest])
