"""Measure how far one draw of images, noise and calibration moves the reward of maps that searches ended with.

Every draw is of training images, with noise and calibration images of its own. Images or calibration images are also drawn anew
by themselves, and noise and calibration images for the reward's own images. What all maps share in a draw is taken off, so that
the paired standard deviation is what a comparison of maps suffers from. Stop it at any time: the same command goes on.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--maps", type=Path, default=Path("experiments/results/compare/budget0.007"), help="folder of run folders")
    parser.add_argument("--count", type=shared_options.whole(3), default=16, help="distinct maps taken from there, at most")
    parser.add_argument("--draws", type=shared_options.whole(2), default=6, help="of each allocation")
    shared_options.add_engine(parser, "draws")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/reward_noise"), help="folder for what is measured")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import itertools
from functools import partial

import numpy as np
from scipy import stats
from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env import ArqError
from arq_env.bitwidths import load_map
from arq_env.evaluation import REWARD_VERSION, CertifierSettings, Evaluator
from arq_env.problem import load_problem
from arq_env.support.files import read_json, write_json
from arq_env.support.provenance import provenance

#: Images, noise samples of each, calibration images: the reward of version 1, today's, and others for as many or more passes.
ALLOCATIONS = ((512, 4, 1_280), (1_000, 2, 320), (2_000, 1, 160), (2_000, 1, 320), (2_000, 1, 1_280), (4_000, 1, 320))
#: What ranks the maps as truly as can be afforded: so many draws of this allocation, their seeds from REFERENCE_SEED on.
REFERENCE, REFERENCE_DRAWS, REFERENCE_SEED = (8_000, 1, 320), 4, 1_000


def main(options):
    files, header, maps = chosen_maps(options)
    problem = header["network"], header["dataset"], header["sigma"], header["provenance"]["training"]
    tasks = [(a, "all", 1 + draw) for a in ALLOCATIONS for draw in range(options.draws)]
    tasks += [((2_000, 1, 320), part, 1 + draw) for part in ("images", "calibration", "reward") for draw in range(options.draws)]
    tasks += [(REFERENCE, "all", REFERENCE_SEED + draw) for draw in range(REFERENCE_DRAWS)]
    store = options.output / f"{options.maps.name}-draws"
    with engine_of(options) as engine:
        found = list(tqdm(engine.map(partial(one_draw, store, problem, maps), tasks), total=len(tasks), unit="draw"))
    by_task = dict(zip(tasks, found, strict=True))
    true = np.mean([row["ratios"] for (_, _, seed), row in by_task.items() if seed >= REFERENCE_SEED], axis=0)
    rows = []
    for (allocation, part), group in itertools.groupby((t for t in tasks if t[2] < REFERENCE_SEED), key=lambda task: task[:2]):
        drawn = [by_task[task] for task in group]
        rows.append(summary(allocation, part, drawn, true))
        print(line(rows[-1]))
    reliability = by_halves([row["ratios"] for (_, _, seed), row in by_task.items() if seed >= REFERENCE_SEED])
    document = {
        "maps": [str(file) for file in files],
        "spread_of_maps": float(true.std(ddof=1)),
        "reference": {"allocation": REFERENCE, "draws": REFERENCE_DRAWS, "spearman_of_its_halves": reliability},
        "reward_version": REWARD_VERSION,
        "rows": rows,
        "provenance": provenance(),
    }
    write_json(options.output / f"{options.maps.name}.json", document)
    print(f"spread of the maps {document['spread_of_maps']:.2%}, Spearman between halves of the reference {reliability:.2f}")


def chosen_maps(options):
    """Files, the first one's other entries, and maps: those of the first run folders by name that differ."""
    files = sorted(options.maps.glob("*/bit_widths.json"))
    if not files:
        raise ArqError(f"{options.maps} holds no run folder with a bit_widths.json: give --maps another folder")
    header = read_json(files[0])
    layers = load_problem(
        header["network"], header["dataset"], sigma=header["sigma"], training=header["provenance"]["training"]
    ).layers
    distinct = {tuple(load_map(file, layers)[0].items()): file for file in reversed(files)}
    chosen = list(distinct.items())[:: -(-len(distinct) // options.count)]
    return [file for _, file in chosen], header, [dict(items) for items, _ in chosen]


def one_draw(store: Path, problem, maps, task) -> dict:
    """Ratios to FP32's ACR of all maps on one draw, and seconds an evaluation; kept in ``store``."""
    (images, n, calibration), part, seed = task
    path = store / f"{images}x{n}-{calibration}-{part}-{seed}.json"
    if path.exists():
        return read_json(path)
    network, dataset, sigma, training = problem
    loaded = load_problem(network, dataset, sigma=sigma, training=training)

    def evaluator(seed, quantizer=None):
        drawn = {"images": images, "n": n, "calibration_images": calibration, "seed": seed, "regained_bits": 1}
        settings = CertifierSettings(**drawn, part="reward" if part == "reward" else "train")
        return Evaluator(loaded, settings, quantizer=quantizer)

    kept = None
    if part in ("images", "calibration"):  # the other is the same in all draws
        kept = evaluator(seed if part == "calibration" else 0).quantizer
    judge = evaluator(0 if part == "calibration" else seed, kept)
    evaluations = [judge.evaluate(bit_widths) for bit_widths in maps]
    row = {
        "ratios": [evaluation.acr / judge.reference.acr for evaluation in evaluations],
        "seconds": float(np.median([evaluation.seconds for evaluation in evaluations])),
    }
    write_json(path, row)
    return row


def summary(allocation, part: str, drawn: list[dict], true: np.ndarray) -> dict:
    """What the draws of one allocation say; Spearman's correlation is with the reference, the mean and the least of the draws."""
    ratios = np.array([row["ratios"] for row in drawn])
    paired = ratios - ratios.mean(1, keepdims=True)
    ranks = [float(stats.spearmanr(row, true)[0]) for row in ratios]
    images, n, calibration = allocation
    return {
        "images": images,
        "samples": n,
        "calibration_images": calibration,
        "drawn_anew": part,
        "draws": len(drawn),
        "paired_standard_deviation": float(np.sqrt(paired.var(axis=0, ddof=1).mean())),
        "spearman": float(np.mean(ranks)),
        "spearman_least": min(ranks),
        "seconds": float(np.median([row["seconds"] for row in drawn])),
    }


def line(row: dict) -> str:
    """One row of the table."""
    return (
        f"{row['images']:>5} x {row['samples']}, {row['calibration_images']:>5} for calibration, new {row['drawn_anew']:<11}: "
        f"paired sd {row['paired_standard_deviation']:.3%}, Spearman {row['spearman']:.2f} (least {row['spearman_least']:.2f}), "
        f"{row['seconds']:.2f} s"
    )


def by_halves(draws: list) -> float:
    """Spearman's correlation between the mean of one half of the draws and that of the other."""
    half = len(draws) // 2
    return float(stats.spearmanr(np.mean(draws[:half], axis=0), np.mean(draws[half:], axis=0))[0])


if __name__ == "__main__":
    command_line.run(main, options)
