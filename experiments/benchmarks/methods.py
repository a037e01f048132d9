"""Measure the noise samples that every certification method needs for its ACR. A stopped run starts over.

The noise is drawn once, at the largest n, and every method takes its samples from this record, so that all methods see the same
noise.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--images", type=shared_options.whole(20), default=250, help="test images, evenly spaced")
    parser.add_argument("--thin", type=shared_options.whole(1), default=5, help="replay for variants on every so many-th of them")
    parser.add_argument("--n", type=shared_options.whole(1_000), default=10_000, help="noise samples that count the class")
    parser.add_argument("--replayed", type=shared_options.whole(10), default=1_000, help="noise samples that a variant replays")
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of the certification noise")
    shared_options.add_engine(parser, "images")
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/certify_benchmark"), help="folder for the table and the plot"
    )
    return parser.parse_args()


options = command_line.start(__name__, parse)

from dataclasses import replace
from functools import partial

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env.bitwidths import uniform
from arq_env.certification import (
    Cohen,
    CompiledNetwork,
    Incremental,
    Method,
    Paired,
    PredictionCache,
    Randomized,
    Request,
    Sequential,
    smoothing_radius,
)
from arq_env.certification.sampling import ESTIMATION, FRESH, SELECTION, Sampler
from arq_env.evaluation import Evaluator
from arq_env.problem import load_problem
from arq_env.registration import DEFAULT, ENVIRONMENTS
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

PRICES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.265, 0.28, 0.3, 0.4, 0.6, 1.0)
RADIUS = 0.5


class Recorded:
    """In place of a sampler: predictions that were made before, a stream for each purpose.

    :param predictions: purpose to [images, samples]
    """

    def __init__(self, predictions: dict[int, np.ndarray], digests: list[str], seed: int):
        self.predictions, self.digests, self.seed = predictions, digests, seed
        self._used = {purpose: np.zeros(len(digests), int) for purpose in predictions}

    def __len__(self):
        return len(self.digests)

    def stream(self, purpose, row):
        return np.random.default_rng([self.seed, purpose, row])

    def select(self, n):
        votes = [np.bincount(row) for row in self.predict(SELECTION, n)]
        return np.array([v.argmax() for v in votes]), np.array([v.max() for v in votes])

    def count(self, purpose, n, classes, rows=None):
        return (self.predict(purpose, n, rows) == np.asarray(classes)[:, None]).sum(1)

    def predict(self, purpose, n, rows=None):
        rows = np.arange(len(self)) if rows is None else rows
        taken = [self.predictions[purpose][row, (used := self._used[purpose][row]) : used + n] for row in rows]
        self._used[purpose][rows] += n
        return np.stack(taken)


def record(network, problem, images, counts: dict[int, int], seed: int, map, what: str) -> tuple[dict[int, np.ndarray], list[str]]:
    """Predictions of noisy copies, as many for each purpose as asked for; and the images' digests."""
    run = partial(record_one, CompiledNetwork(network), problem.sigma, seed, counts)
    parts, digests = zip(*tqdm(map(run, images.numpy()), total=len(images), desc=what), strict=True)
    return {purpose: np.stack([part[purpose] for part in parts]) for purpose in counts}, list(digests)


def record_one(network, sigma, seed, counts, image):
    """Predictions of one image's noisy copies, and its digest."""
    sampler = Sampler(network, image[None], [0], sigma=sigma, seed=seed, batch_size=network.batch_size, device=torch.device("cpu"))
    return {purpose: sampler.predict(purpose, n)[0].astype(np.uint8) for purpose, n in counts.items()}, sampler.digests[0]


def run_method(method: Method, labels, predictions, digests, request: Request) -> dict:
    """ACR, clean accuracy and samples an image of one method on recorded predictions."""
    selected, lower, n, _ = method.bound(Recorded(predictions, digests, request.seed), labels, request)
    radius = np.where((lower > 0.5) & (selected == labels), smoothing_radius(request.sigma, lower), 0)
    pilot = 0 if isinstance(method, Incremental | Paired) else request.n0
    return {"acr": float(radius.mean()), "samples_an_image": float(n.mean()) + pilot, "radius": radius}


def samples(problem, images, labels, n: int, thin: int, replayed: int, seed: int, map) -> dict:
    """All methods on the same noise: FP32 by each, and quantized variants by replaying FP32's."""
    request = Request(problem.sigma, 100, n, 0.001, seed)
    counts = {SELECTION: request.n0, ESTIMATION: n}
    fp32, digests = record(problem.network, problem, images, counts, seed, map, "FP32")
    full = run_method(Cohen(), labels, fp32, digests, request)
    curve = {"cohen": [], "randomized": [], "sequential": []}
    for size in np.unique(np.geomspace(100, n, 9).astype(int)):
        for method in (Cohen(), Randomized()):
            curve[method.name].append(run_method(method, labels, fp32, digests, replace(request, n=int(size))))
    for price in PRICES:
        got = run_method(Sequential(price=price), labels, fp32, digests, request)
        curve["sequential"].append(got | {"price": price})
    for points in curve.values():
        for point in points:
            point["acr_ratio"] = point["acr"] / full["acr"]
            point["samples_ratio"] = point["samples_an_image"] / full["samples_an_image"]

    decided = run_method(Sequential(radius=RADIUS), labels, fp32, digests, request)
    yes, cohen_yes = decided["radius"] >= RADIUS, full["radius"] >= RADIUS
    decision = {
        "radius": RADIUS,
        "samples_an_image": decided["samples_an_image"],
        "samples_ratio": decided["samples_an_image"] / full["samples_an_image"],
        "certified": int(yes.sum()),
        "certified_by_cohen": int(cohen_yes.sum()),
        "certified_by_both": int((yes & cohen_yes).sum()),
    }

    images, labels, digests = images[::thin], labels[::thin], digests[::thin]
    fp32 = {purpose: predictions[::thin] for purpose, predictions in fp32.items()}
    top = np.array([np.bincount(row).argmax() for row in fp32[SELECTION]])
    counts = (fp32[ESTIMATION] == top[:, None]).sum(1)
    cache = PredictionCache(top, counts, fp32[ESTIMATION], digests, problem.sigma, seed, request.n0, network="")
    evaluator, variants = Evaluator(problem), {}
    for bits in (8, 6, 4):
        network = evaluator.quantizer.quantize(uniform(problem.layers, bits, bits))
        counts = dict.fromkeys((SELECTION, ESTIMATION, FRESH), replayed) | {SELECTION: request.n0}
        own, _ = record(network, problem, images, counts, seed, map, f"W{bits}A{bits}")
        points = {"cohen": [], "incremental": [], "paired": []}
        for size in np.unique(np.geomspace(max(1, replayed // 10), replayed, 5).astype(int)):
            for method in (Cohen(), Incremental(cache), Paired(cache)):
                points[method.name].append(plain(run_method(method, labels, own, digests, replace(request, n=int(size)))))
        variants[f"W{bits}A{bits}"] = {
            "images": len(images),
            "disagreement": float((own[ESTIMATION] != fp32[ESTIMATION][:, :replayed]).mean()),
            "curve": points,
        }
    return {
        "cohen": plain(full),
        "curve": {method: [plain(point) for point in points] for method, points in curve.items()},
        "decision": decision,
        "variants": variants,
    }


def plain(row: dict) -> dict:
    """Without the radii."""
    return {name: value for name, value in row.items() if name != "radius"}


def plot(curves: dict[str, dict], path: Path) -> None:
    """ACR against samples an image, a panel a network and a line a method."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4))
    for axes, (title, curve) in zip(panels, curves.items(), strict=True):
        for method, points in curve.items():
            axes.plot([p["samples_an_image"] for p in points], [p["acr"] for p in points], marker="o", label=method)
        axes.set(title=title, xscale="log", xlabel="noise samples an image, selection included", ylabel="ACR")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def main(options):
    problem = load_problem(**ENVIRONMENTS[DEFAULT], sigma=0.5)
    images, labels = problem.test_images(every=max(1, problem.dataset.counts["test"] // options.images))
    images, labels = images[: options.images], labels[: options.images]
    settings = {name: getattr(options, name) for name in ("thin", "n", "replayed", "seed")}
    with engine_of(options) as engine:
        taken = samples(problem, images, labels, options.n, options.thin, options.replayed, options.seed, engine.map)
    document = {
        "checkpoint": problem.card["digest"],
        "sigma": problem.sigma,
        "settings": settings | {"images": len(images), "processes": engine.workers},
        "samples": taken,
        "provenance": provenance(),
    }
    write_json(options.output / "methods.json", document)
    curves = {"FP32": taken["curve"]} | {f"{name}, FP32 replayed": variant["curve"] for name, variant in taken["variants"].items()}
    plot(curves, options.output / "acr_against_samples.png")
    report(taken)


def report(taken: dict) -> None:
    """Print what matters."""
    decision = taken["decision"]
    print(
        f"certified at {decision['radius']} or not: {decision['samples_ratio']:.3f} of cohen's samples; "
        f"{decision['certified']} images, cohen {decision['certified_by_cohen']}, both {decision['certified_by_both']}"
    )
    for point in taken["curve"]["sequential"]:
        ratios = f"{point['acr_ratio']:.3f} of the ACR, {point['samples_ratio']:.3f} of the samples"
        print(f"sequential, price {point['price']:g}: {ratios}")
    for variant, table in taken["variants"].items():
        print(f"{variant}, disagreement {table['disagreement']:.1%}")
        for method, points in table["curve"].items():
            print(f"  {method}: ACR {points[-1]['acr']:.4f}, {points[-1]['samples_an_image']:.0f} samples an image")


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
