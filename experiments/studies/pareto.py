"""Finish maps of many budgets alike and draw their Pareto curves: certified radius over FP32's against bit operations.

Each --maps is the name of one way to find maps and its maps: bit_widths.json files, or uniform bits such as W4A4. Every map is
fine-tuned by one short recipe and certified on test images, as compare_searches.py does it, and what is in --store already is
not made again. Maps of two curves that cost about the same are also compared in pairs, image by image.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--maps", nargs="+", action="append", required=True, metavar=("NAME", "MAP"), help="a curve and its maps")
    shared_options.add_environment(parser, training="consistency", regained_bits=1)
    parser.set_defaults(budget=1.0)  # maps are taken as they are
    shared_options.add_engine(parser, "maps")
    shared_options.add_finishing(parser)
    parser.add_argument(
        "--store", type=Path, default=Path("runs/compare"), help="folder of compare_searches.py, for what is finished"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/pareto.json"), help="JSON file; the plot goes beside it")
    options = parser.parse_args()
    for name, *given in options.maps:
        if not given:
            parser.error(f"--maps {name} names no map: give a bit_widths.json or uniform bits such as W4A4 for each")
    return options


options = command_line.start(__name__, parse)

from itertools import combinations

import matplotlib

from arq_agents.finishing import finish
from arq_agents.main import engine_of, make_env
from arq_env.bitwidths import bops_fraction, load_map, named_uniform
from arq_env.comparison import FP32, standard_error
from arq_env.env import arq_env_of
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

#: Maps whose bit operations differ by no more than this factor are compared in pairs.
ALIKE = 1.1


def main(options):
    layers = arq_env_of(make_env(options)).layers
    maps = {(name, one): chosen_map(one, layers) for name, *given in options.maps for one in given}
    with engine_of(options) as engine:
        radii = finish(engine, {FP32: None, **maps}, options, options.store)
    fp32, curves = radii[FP32], {name: [] for name, *_ in options.maps}
    for (name, one), bit_widths in maps.items():
        own = radii[name, one]
        ratio = own.mean() / fp32.mean()
        row = {"map": one, "bops_fraction": bops_fraction(bit_widths, layers), "acr": float(own.mean()), "ratio": float(ratio)}
        curves[name].append(row | {"standard_error": standard_error(own - ratio * fp32) / float(fp32.mean())})
    for rows in curves.values():
        rows.sort(key=lambda row: row["bops_fraction"])
    settings = {name: getattr(options, name) for name in ("env", "sigma", "training", "weights", "steps", "every", "n")}
    pairs = paired(curves, radii, float(fp32.mean()))
    figures = {"fp32_finished_acr": float(fp32.mean()), "curves": curves, "pairs": pairs}
    write_json(options.output, {"settings": settings, **figures, "provenance": provenance()})
    plot(curves, options)
    print(table(curves, pairs))


def chosen_map(given: str, layers):
    """The map that a file or a name such as W4A4 stands for."""
    uniform = named_uniform(given, layers)
    return load_map(Path(given), layers)[0] if uniform is None else uniform


def paired(curves: dict, radii: dict, fp32: float) -> list[dict]:
    """The difference in ACR, over FP32's, of each two maps of different curves that cost about the same."""
    rows, pairs = [(name, row) for name, curve in curves.items() for row in curve], []
    for (a, first), (b, second) in combinations(rows, 2):
        costs = [first["bops_fraction"], second["bops_fraction"]]
        if a != b and max(costs) <= ALIKE * min(costs):
            less = (radii[a, first["map"]] - radii[b, second["map"]]) / fp32
            found = {"difference": float(less.mean()), "standard_error": standard_error(less), "cost_ratio": costs[0] / costs[1]}
            pairs.append({"maps": [a, first["map"]], "against": [b, second["map"]], **found})
    return pairs


def table(curves: dict, pairs: list[dict]) -> str:
    """One line a map and one a pair, as Markdown."""
    lines = ["| maps | BOPs of FP32 | ACR of FP32 finished alike |", "| --- | --- | --- |"]
    for name, rows in curves.items():
        lines += [f"| {name} | {row['bops_fraction']:.3%} | {row['ratio']:.3f} +- {row['standard_error']:.3f} |" for row in rows]
    lines += ["", "| map | against | its cost over that one's | difference in ACR over FP32's |", "| --- | --- | --- | --- |"]
    for pair in pairs:
        (a, first), (b, second) = pair["maps"], pair["against"]
        difference = f"{pair['difference']:+.4f} +- {pair['standard_error']:.4f}"
        lines.append(f"| {a}: {first} | {b}: {second} | {pair['cost_ratio']:.3f} | {difference} |")
    return "\n".join(lines)


def plot(curves: dict, options) -> None:
    """Ratio to FP32 finished alike against bit operations, with one standard error over the images."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, rows in curves.items():
        cost, ratio, error = ([row[key] for row in rows] for key in ("bops_fraction", "ratio", "standard_error"))
        axes.errorbar([100 * c for c in cost], ratio, error, label=name, marker="o", markersize=4, capsize=2)
    axes.set(xscale="log", xlabel="bit operations, % of FP32's", ylabel="ACR over FP32's, finished alike")
    axes.set_title(f"{options.env}, sigma {options.sigma:g}, {options.training}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(options.output.with_suffix(".png"), dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command_line.run(main, options)
