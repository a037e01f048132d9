"""Measure the certifier's time against adversarial-robustness-toolbox's, real runs taken in turns. A stopped run starts over."""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--images", type=shared_options.whole(1), default=50, help="test images, evenly spaced")
    parser.add_argument("--n", type=shared_options.whole(1_000), default=10_000, help="noise samples that count the class")
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of the certification noise")
    parser.add_argument(
        "--processes",
        type=shared_options.whole(1),
        help="for the compiled network, one thread each (default: as many as torch has threads)",
    )
    parser.add_argument("--output", type=Path, default=Path("experiments/results/certify_benchmark"), help="folder for the table")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import time
import tracemalloc
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from arq_env import ArqError
from arq_env.certification import CompiledNetwork, certify
from arq_env.problem import load_problem
from arq_env.registration import DEFAULT, ENVIRONMENTS
from arq_env.support.engines import workers
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

N0, ALPHA = 100, 0.001


def speed(problem, images, labels, n: int, seed: int, processes: int, map) -> dict:
    """Rates of cohen, of the other tool and of bare forward passes.

    All get the same module, its convolutions channels-last, which suits a CPU. Cohen is timed with the module as it is, with
    it compiled, without the time of the compilation, and with the compiled one in worker processes. What only needs a rate
    gets a tenth of the noise samples.
    """
    network, compiled, other = problem.network, CompiledNetwork(problem.network), other_tool(problem)
    batch = torch.rand(32, *problem.input_shape).to(memory_format=torch.channels_last)
    settings = {"sigma": problem.sigma, "n0": N0, "alpha": ALPHA, "seed": seed}
    tenth = n // 10

    @torch.inference_mode()
    def bare(count):
        for _ in range(count // len(batch)):
            network(batch)
        return count // len(batch) * len(batch)

    certify(compiled, images[:1], labels[:1], n=100, **settings)
    few = slice(2 * processes)
    certify(compiled, images[few], labels[few], n=10_000, map=map, **settings)  # a task an image, so that each worker compiles
    bare(320)
    calls = {
        "plain": partial(certify, network, n=tenth, **settings),
        "bare": lambda images, labels: bare(len(images) * (N0 + tenth)),
        "compiled": partial(certify, compiled, n=tenth, **settings),
        "processes": partial(certify, compiled, n=n, map=map, **settings),
        "art": lambda images, labels: other.certify(images.numpy(), n=n),
    }
    seconds, results = timed(calls, images, labels, "speed")
    whole, fraction = len(images) * (N0 + n), len(images) * (N0 + tenth)
    forwards = {"plain": fraction, "bare": sum(results["bare"]), "compiled": fraction, "processes": whole, "art": whole}
    table = rates(seconds, forwards)
    per_second = table["forwards_per_second"]
    radius = np.concatenate([certificates.certified_radius for certificates in results["processes"]])
    other_prediction, other_radius = (np.concatenate(parts) for parts in zip(*results["art"], strict=True))
    return {
        "images": len(images),
        "n": n,
        "threads": torch.get_num_threads(),
        "processes": processes,
        **table,
        "share_of_bare_rate": per_second["plain"] / per_second["bare"],
        "acr": {"processes": float(radius.mean()), "art": float(np.where(other_prediction == labels, other_radius, 0).mean())},
        "peak_megabytes": {f"n={count}": peak_megabytes(images[:1], count, seed) for count in (n // 10, n, 10 * n)},
    }


def one_thread(problem, images, labels, n: int, seed: int) -> dict:
    """As :func:`speed`, each on a single thread, with a twentieth of the noise samples: two threads help one program more than
    another, and on a busy machine they help none."""
    torch.set_num_threads(1)  # for good: this is measured last
    compiled, other = CompiledNetwork(problem.network), other_tool(problem)
    settings = {"sigma": problem.sigma, "n0": N0, "alpha": ALPHA, "seed": seed}
    certify(compiled, images[:1], labels[:1], n=100, **settings)
    few_samples = n // 20
    calls = {
        "plain": partial(certify, problem.network, n=few_samples, **settings),
        "compiled": partial(certify, compiled, n=few_samples, **settings),
        "art": lambda images, labels: other.certify(images.numpy(), n=few_samples),
    }
    seconds, _ = timed(calls, images, labels, "one thread")
    forwards = dict.fromkeys(calls, len(images) * (N0 + few_samples))
    return {"images": len(images), "n": few_samples, **rates(seconds, forwards)}


def timed(calls: dict, images, labels, what: str) -> tuple[dict, dict]:
    """Make the calls in turns on parts of the images, so that a busy machine slows all of them alike.

    :param calls: name to function of images and labels
    :return: name to seconds, name to what was returned for each part
    """
    seconds, results = dict.fromkeys(calls, 0.0), {name: [] for name in calls}
    for part in tqdm(np.array_split(np.arange(len(images)), min(5, len(images))), desc=what):
        few, of = images[part], labels[part]
        for name, call in calls.items():
            start = time.perf_counter()
            result = call(few, of)
            seconds[name] += time.perf_counter() - start
            results[name].append(result)
    return seconds, results


def rates(seconds: dict, forwards: dict) -> dict:
    """Forward passes a second, and the time that cohen takes for as many as the other tool."""
    per_second = {name: forwards[name] / seconds[name] for name in seconds}
    ratios = {name: per_second["art"] / rate for name, rate in per_second.items() if name not in ("bare", "art")}
    return {"seconds": seconds, "forwards_per_second": per_second, "time_ratio_to_art": ratios}


def other_tool(problem):
    """The problem's network in adversarial-robustness-toolbox."""
    try:
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
    except ImportError as error:
        raise ArqError(f'the other tool is missing ({error}): pip install -e ".[test]"') from error
    return PyTorchRandomizedSmoothing(
        model=problem.network,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=problem.input_shape,
        nb_classes=len(problem.dataset.classes),
        device_type="cpu",
        sample_size=N0,
        scale=problem.sigma,
        alpha=ALPHA,
    )


def peak_megabytes(image, n: int, seed: int) -> float:
    """Most memory that Python and NumPy hold while one image is certified for a classifier that needs none."""
    tracemalloc.start()
    certify(lambda batch: np.zeros(len(batch), int), image.numpy(), [0], sigma=0.5, n=n, seed=seed)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e6


def main(options):
    options.processes = options.processes or torch.get_num_threads()
    problem = load_problem(**ENVIRONMENTS[DEFAULT], sigma=0.5)
    images, labels = problem.test_images(every=max(1, problem.dataset.counts["test"] // options.images))
    images, labels = images[: options.images], labels[: options.images]
    settings = {name: getattr(options, name) for name in ("n", "seed", "processes")} | {"images": len(images)}
    with workers(options.processes) as pool:
        fast = speed(problem, images, labels, options.n, options.seed, options.processes, pool.map)
    document = {
        "checkpoint": problem.card["digest"],
        "sigma": problem.sigma,
        "settings": settings,
        "speed": fast,
        "one_thread": one_thread(problem, images, labels, options.n, options.seed),
        "provenance": provenance(),
    }
    write_json(options.output / "time.json", document)
    report(document)


def report(document: dict) -> None:
    """Print what matters."""
    fast = document["speed"]
    for name, ratio in fast["time_ratio_to_art"].items():
        print(f"cohen, {name}: {ratio:.2f} of adversarial-robustness-toolbox's time")
    for name, ratio in document["one_thread"]["time_ratio_to_art"].items():
        print(f"cohen, {name}, all on one thread: {ratio:.2f} of its time")
    print(f"plain, it runs at {fast['share_of_bare_rate']:.0%} of the rate of bare forward passes")
    print("peak memory beside the network: " + ", ".join(f"{n}: {mb:.1f} MB" for n, mb in fast["peak_megabytes"].items()))


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
