"""Measure evaluations and certification passes an hour with 1 and 2 workers, and work out what 8, 64 and 512 would give.

On paper: a worker's seconds are spread over the workers, this process's seconds and the bytes of its messages are not. A stopped
run starts over.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--env", default="ARQ-ResNet20-v0", help="environment id; ARQ-ResNet20-Signs-v0 downloads nothing")
    parser.add_argument("--maps", type=shared_options.whole(2), default=8, help="evaluated at a time")
    parser.add_argument("--images", type=shared_options.whole(1), default=64, help="to certify")
    parser.add_argument("--n", type=shared_options.whole(10), default=256, help="noise samples of each of them")
    parser.add_argument("--workers", type=shared_options.whole(1), nargs="+", default=[1, 2], help="that are measured")
    parser.add_argument("--on-paper", type=shared_options.whole(1), nargs="+", default=[8, 64, 512], help="that are worked out")
    parser.add_argument("--megabytes", type=float, default=100.0, help="a second that the network carries, on paper")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/scale.json"), help="JSON file")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import pickle
import time

import gymnasium
import numpy as np
import torch

import arq_env  # noqa: F401  (registers the ids)
from arq_env.bitwidths import uniform
from arq_env.certification import certify
from arq_env.evaluation import MOST_PARTS, Evaluator
from arq_env.support.engines import Engine, workers
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

N0 = 10


class Counted(Engine):
    """An engine in this process that counts what a worker would be sent once, what tasks take there and back, and their seconds."""

    workers = 2  # so that evaluations are made of tasks

    def __init__(self):
        self._held = {}
        self.reset()

    def reset(self):
        self.once = self.tasks = self.bytes = 0
        self.seconds = 0.0

    def map(self, function, items):
        pickled = pickle.dumps(function)
        self.once, function = len(pickled), self._held.setdefault(pickled, function)
        for item in items:
            start = time.perf_counter()
            result = function(item)
            self.seconds += time.perf_counter() - start
            self.tasks += 1
            self.bytes += len(pickle.dumps(item)) + len(pickle.dumps(result))
            yield result


def main(options):
    torch.set_num_threads(1)
    env = gymnasium.make(options.env, disable_env_checker=True).unwrapped
    evaluator, problem = env.evaluator, env.problem
    every = -(-len(problem.dataset.test.images) // options.images)
    images, labels = problem.test_images(every)
    rng = np.random.default_rng(0)
    maps = [env.decode(rng.uniform(-1, 1, (env.horizon, 2))) for _ in range(options.maps)]

    def evaluate(engine):
        fresh = Evaluator(problem, evaluator.settings)
        vars(fresh).update({name: vars(evaluator)[name] for name in ("quantizer", "rounding", "_reward")})  # measured once
        fresh.engine = engine
        return lambda: fresh.evaluate_many(maps)

    def certificate(engine):
        return lambda: certify(problem.network, images, labels, sigma=problem.sigma, n0=N0, n=options.n, alpha=0.01, map=engine.map)

    evaluator.evaluate_many([uniform(env.layers, 4, 4)])
    _ = evaluator.reference, evaluator.rounding
    jobs = {
        "evaluations": (evaluate, len(maps)),
        "certification passes": (certificate, len(images) * (N0 + options.n)),
    }
    rows = []
    for name, (job, count) in jobs.items():
        measured = {}
        for number in options.workers:
            with workers(number) as engine:
                job(engine)()  # not counted: workers load and calibrate
                start = time.perf_counter()
                job(engine)()
                measured[number] = 3_600 * count / (time.perf_counter() - start)
        counted = Counted()
        job(counted)()
        counted.reset()
        start = time.perf_counter()
        job(counted)()
        here = time.perf_counter() - start - counted.seconds
        row = {
            "what": name,
            "tasks": counted.tasks,
            "bytes_to_a_worker_once": counted.once,
            "bytes_a_task": counted.bytes / counted.tasks,
            "worker_seconds_each": counted.seconds / count,
            "serial_seconds_each": here / count,
            "an_hour": measured,
        }
        slowest = max(here, counted.bytes / (1e6 * options.megabytes)) / count
        row["an_hour_on_paper"] = {n: 3_600 / max(counted.seconds / count / n, slowest) for n in options.on_paper}
        row["seconds_to_send_once_on_paper"] = {n: counted.once * n / (1e6 * options.megabytes) for n in options.on_paper}
        rows.append(row)
        for key, value in row.items():
            print(f"{key}: {value}")
    print(f"one map at a time is shared by at most {MOST_PARTS} workers, each of which quantizes it anew")
    settings = {key: getattr(options, key) for key in ("env", "maps", "images", "n", "megabytes")}
    write_json(options.output, {"settings": settings, "rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
