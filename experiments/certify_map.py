"""Certify a found map on test images beside FP32 and uniform maps, all on the same images and the same noise.

Tables that are already there, for the same network, map and settings, are not made again: stop it and go on at any time.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder of a search, or a bit_widths.json, found or edited by hand")
    parser.add_argument(
        "--uniform",
        type=shared_options.whole(2, 8),
        nargs="*",
        default=[4],
        metavar="BITS",
        help="uniform maps to compare with, the first as the base",
    )
    shared_options.add_test_settings(parser)
    shared_options.add_engine(parser, "images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output", type=Path, help="JSON file for the figures (default: beside the map, named by every, offset and n)"
    )
    options = parser.parse_args()
    if not options.uniform:
        parser.error("--uniform needs at least one bit-width to compare with")
    return options


options = command_line.start(__name__, parse)

from functools import partial

from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env.bitwidths import uniform
from arq_env.comparison import TestSettings, compare_maps
from arq_env.evaluation import Evaluator
from arq_env.problem import load_mapped
from arq_env.report.tables import comparison_table, layer_table
from arq_env.rewards import settings_of
from arq_env.support.files import write_json


def main(options):
    problem, found, document, path = load_mapped(options.run, options.device)
    maps = {f"W{bits}A{bits}": uniform(problem.layers, bits, bits) for bits in options.uniform} | {"found": found}
    settings = TestSettings(options.every, options.offset, options.n0, options.n, options.alpha, options.seed)
    evaluator = Evaluator(problem, settings_of(document))
    print(layer_table(problem.layers, found), end="\n\n")
    with engine_of(options) as engine:
        comparison = compare_maps(
            evaluator,
            maps,
            settings,
            folder=path.parent / "certificates",
            map=engine.map,
            progress=lambda name: partial(tqdm, desc=name),
        )
    print(comparison_table(comparison))
    output = options.output or path.parent / f"{path.stem}-every{options.every}-offset{options.offset}-n{options.n}.json"
    write_json(output, comparison.document(evaluator))
    print(output)


if __name__ == "__main__":
    command_line.run(main, options)
