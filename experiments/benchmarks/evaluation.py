"""Measure where the time of one evaluation goes, its share inside forward passes, and how long a step takes."""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--env", default="ARQ-ResNet20-v0", help="environment id")
    parser.add_argument("--repeats", type=shared_options.whole(1, 7), default=7, help="different maps to evaluate, up to 7")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of noise and calibration")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("experiments/results/evaluation_cost.json"),
        help="JSON file for the figures",
    )
    return parser.parse_args()


options = command_line.start(__name__, parse)

import statistics
import time
from contextlib import contextmanager

import gymnasium
import torch
from tqdm import tqdm

import arq_env  # noqa: F401  (registers the ids)
from arq_env.bitwidths import uniform
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance


@contextmanager
def timed(owner, name: str, seconds: list):
    """Add the duration of each call of ``owner.name`` to ``seconds``."""
    original = getattr(owner, name)

    def wrapper(*arguments, **keywords):
        start = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, wrapper)
    try:
        yield
    finally:
        setattr(owner, name, original)


def step_seconds(env, episodes: int = 20) -> float:
    """Median duration of a step that is not the last."""
    seconds = []
    for _ in range(episodes):
        env.reset()
        for _ in env.free_layers[:-1]:
            action = env.action_space.sample()
            start = time.perf_counter()
            env.step(action)
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(options):
    env = gymnasium.make(options.env, device=options.device, seed=options.seed, disable_env_checker=True).unwrapped
    evaluator, layers = env.evaluator, env.layers
    start = time.perf_counter()
    _ = evaluator.reference, evaluator.quantizer
    once = time.perf_counter() - start
    evaluator.evaluate(uniform(layers, 8, 8))  # not counted: the first pass allocates
    rows = []
    network_class = type(env.problem.network)
    for bits in tqdm(range(2, 2 + options.repeats), unit="map"):
        bit_widths = uniform(layers, bits, (bits - 1) % 7 + 2)
        evaluator.quantizer.quantize(bit_widths)  # not counted: a search chooses the step sizes of these bits only once
        whole, forward, quantize = [], [], []
        with timed(network_class, "forward", forward), timed(evaluator.quantizer, "quantize", quantize):
            with timed(evaluator, "evaluate", whole):
                evaluator.evaluate(bit_widths)
        rows.append({"evaluation": sum(whole), "forward": sum(forward), "quantize_with_batch_norm": sum(quantize)})
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    median["certify"] = median["evaluation"] - median["quantize_with_batch_norm"]
    median["forward_share"] = median["forward"] / median["evaluation"]
    for key, value in median.items():
        print(f"{key:<26}{value:8.3f}")
    microseconds = 1e6 * step_seconds(env)
    print(f"{'step, not the last (us)':<26}{microseconds:8.1f}")
    document = {
        "env": options.env,
        "settings": vars(evaluator.settings),
        "seconds_once": once,
        "median_seconds": median,
        "median_step_microseconds": microseconds,
        "repeats": options.repeats,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    write_json(options.output, document)


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
