"""Measure what other busy processes cost: of an evaluation and a certificate, by torch's threads, one thread and processes.

Beside none, one and three processes that do nothing but compute, all ways in turns, so that what else the machine does meets all
alike. The fair share of the cores is what each process would get if all that are busy got the same; what a way takes beyond the
time that this leaves it is its excess. A stopped run starts over.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--env", default="ARQ-ResNet20-v0", help="environment id; ARQ-ResNet20-Signs-v0 downloads nothing")
    parser.add_argument("--busy", type=shared_options.whole(0), nargs="+", default=[0, 1, 3], help="other processes")
    parser.add_argument("--images", type=shared_options.whole(1), default=24, help="of the certificate")
    parser.add_argument("--n", type=shared_options.whole(10), default=100, help="noise samples of each of them")
    parser.add_argument("--repeats", type=shared_options.whole(1), default=5, help="of each, the median counts")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/busy.json"), help="JSON file")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import contextlib
import statistics
import subprocess
import sys
import time
from functools import partial

import gymnasium
import torch
from tqdm import tqdm

import arq_env  # noqa: F401  (registers the ids)
from arq_env.bitwidths import uniform
from arq_env.certification import certify
from arq_env.support.engines import Engine, workers
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance


@contextlib.contextmanager
def busy(count: int):
    """So many processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextlib.contextmanager
def threads(count: int):
    """torch on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(options):
    cores = torch.get_num_threads()
    evaluator = gymnasium.make(options.env, disable_env_checker=True).unwrapped.evaluator
    problem = evaluator.problem
    every = -(-len(problem.dataset.test.images) // options.images)
    images, labels = problem.test_images(every)
    maps = [uniform(problem.layers, bits, bits) for bits in (3, 4)]
    asked = {"sigma": problem.sigma, "n0": 10, "n": options.n, "alpha": 0.01}

    def evaluate(engine: Engine):
        evaluator.engine = engine
        evaluator._known.clear()
        evaluator.evaluate(maps[0])

    def certificate(engine: Engine):
        certify(problem.network, images, labels, **asked, map=engine.map)

    rows = []
    with workers(cores) as processes:
        ways = {"threads": (cores, Engine()), "one thread": (1, Engine()), "processes": (1, processes)}
        jobs = {"evaluation": evaluate, "certificate": certificate}
        for threads_of, engine in ways.values():  # not counted: workers load, and step sizes are chosen
            with threads(threads_of):
                for job in (*jobs.values(), *jobs.values()):
                    job(engine)
        for others in options.busy:
            taken = {(job, way): [] for job in jobs for way in ways}
            with busy(others):
                for _ in tqdm(range(options.repeats), desc=f"beside {others}"):
                    for (job, way), times in taken.items():
                        count, engine = ways[way]
                        with threads(count):
                            times.append(seconds(partial(jobs[job], engine)))
            for job in jobs:
                rows.append({"job": job, "busy": others, **{way: statistics.median(taken[job, way]) for way in ways}})
    alone = {row["job"]: row for row in rows if row["busy"] == 0}
    for row in rows:
        if row["job"] in alone:
            row["processes_over_threads_alone"] = row["processes"] / alone[row["job"]]["threads"]
            row["processes_over_fair_share"] = row["processes"] / (alone[row["job"]]["processes"] * fair(cores, row["busy"]))
    for row in rows:
        print(" ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    settings = {name: getattr(options, name) for name in ("env", "busy", "images", "n", "repeats")} | {"cores": cores}
    write_json(options.output, {"settings": settings, "median_seconds": rows, "provenance": provenance()})


def fair(cores: int, others: int) -> float:
    """By how much a job of one process a core takes longer where every busy process gets the same share of the cores.

    >>> fair(2, 0), fair(2, 1), fair(2, 3)
    (1.0, 1.5, 2.5)
    """
    return max(1.0, (cores + others) / cores)


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
