"""Does the in-loop evaluation rank maps as they rank once they are finished? Spearman's correlation over random maps.

Every map is scored as in a search, without fine-tuning, and by how far its predictions are from FP32's, then fine-tuned and
certified on reward images that the in-loop evaluation does not see. Stop it at any time: every map that is done is in the JSON
lines beside the result, and the same command goes on there.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--maps", type=shared_options.whole(4), default=30, help="random maps, the budgets taking turns")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 64, 0.009], help="bit operations, as fractions of FP32's")
    parser.add_argument("--sigma", type=float, default=0.5, help="standard deviation of the noise")
    parser.add_argument("--training", default="gaussian", help="of the base network")
    parser.add_argument("--steps", type=shared_options.whole(1), default=128, help="batches of fine-tuning")
    parser.add_argument(
        "--n", type=shared_options.whole(5), default=32, help="noise samples that count a class of a finished network"
    )
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of maps, training and noise")
    shared_options.add_engine(parser, "maps")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/rank_maps"), help="folder for the figures")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import concurrent.futures
import dataclasses
import json
import time

import numpy as np
from scipy import stats
from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env import ArqError
from arq_env.bitwidths import Bits
from arq_env.certification import Cohen, certify
from arq_env.env import ArqEnv
from arq_env.evaluation import REWARD_VERSION, CertifierSettings, Evaluator
from arq_env.finishing import brief_recipe, finish_briefly
from arq_env.problem import load_problem
from arq_env.registration import DEFAULT, ENVIRONMENTS
from arq_env.support.files import drop_partial_line, write_json
from arq_env.support.provenance import provenance

#: Images that judge the finished networks: the reward split's last ones.
JUDGES = 1_024
#: Images that the soft scores are measured on: the first ones, with one noise sample each.
SCORED = 976
#: Scored as `regained_bits` of :class:`arq_env.evaluation.CertifierSettings` says.
FINER = "weights 1 bit finer"


class Worker:
    """Scores and finishes maps in one worker; built once there."""

    def __init__(self, options):
        self.options = options
        problem = load_problem(**ENVIRONMENTS[DEFAULT], sigma=options.sigma, training=options.training)
        self.env = ArqEnv(problem, settings=CertifierSettings(images=SCORED))
        others = {
            f"soft, {SCORED} x 1, {FINER}": CertifierSettings(images=SCORED, regained_bits=1),
            "counted, 512 x 8": CertifierSettings(images=512, n0=4, n=8, reward_method="cohen"),
            "counted, 128 x 32": CertifierSettings(images=128, n0=16, n=32, reward_method="cohen"),
        }
        own = self.env.evaluator
        alike = {name: Evaluator(problem, settings, quantizer=own.quantizer) for name, settings in others.items()}
        self.evaluators = {f"soft, {SCORED} x 1": own} | alike
        _ = self.env.evaluator.divergence  # FP32's predictions, before a clock starts

    def map(self, index: int) -> dict:
        """The map of an episode of random actions under the budget whose turn it is, and its scores."""
        options = self.options
        budget = options.budgets[index % len(options.budgets)]
        self.env.reset(options={"budget": budget})
        self.env.action_space.seed(options.seed * 10_000 + index)
        done = False
        while not done:
            _, _, done, _, info = self.env.step(self.env.action_space.sample())
        bit_widths = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
        scores, seconds = self.scores(bit_widths)
        start = time.perf_counter()
        network = finish_briefly(self.env.evaluator, bit_widths, options.steps, options.seed)
        trained = time.perf_counter() - start
        after = self.judge(network)
        return {
            "index": index,
            "budget": budget,
            "bops_fraction": info["bops_fraction"],
            "bit_widths": info["bit_widths"],
            "in_loop": scores,
            "in_loop_seconds": seconds,
            "training_seconds": trained,
            "after": float(after.mean()),
            "radii_after": [round(float(radius), 4) for radius in after],
        }

    def scores(self, bit_widths) -> tuple[dict[str, float], dict[str, float]]:
        """What a search could go by, higher for better, and the seconds that each took."""
        in_loop = {name: evaluator.evaluate(bit_widths) for name, evaluator in self.evaluators.items()}
        scores = {name: evaluation.acr for name, evaluation in in_loop.items()}
        seconds = {name: evaluation.seconds for name, evaluation in in_loop.items()}
        finer = self.evaluators[f"soft, {SCORED} x 1, {FINER}"].regained(bit_widths)
        for name, judged in {"divergence": bit_widths, f"divergence, {FINER}": finer}.items():
            start = time.perf_counter()
            scores[name] = -self.env.evaluator.divergence(judged)
            seconds[name] = time.perf_counter() - start
        return scores, seconds

    def judge(self, network) -> np.ndarray:
        """Certified radii on the last images of the reward split."""
        problem, options = self.env.problem, self.options
        images, labels = problem.reward_images(JUDGES, len(problem.dataset.reward.images) - JUDGES)
        samples = {"n0": 8, "n": options.n, "alpha": 0.05, "seed": options.seed, "method": Cohen(skip_wrong=True)}
        return certify(network, images, labels, sigma=problem.sigma, **samples).certified_radius


worker: Worker | None = None


def do_map(options, index: int) -> dict:
    """What a process does with an index."""
    global worker
    worker = worker or Worker(options)
    return worker.map(index)


def agreement(records: list[dict]) -> dict:
    """Spearman's correlation of each in-loop evaluation with the finished networks' ACR, and that ACR's reliability.

    Reliability: the correlation between the two halves of the judging images, stepped up to all of them (Spearman and Brown).
    """
    after = np.array([record["radii_after"] for record in records])
    halves = stats.spearmanr(after[:, ::2].mean(1), after[:, 1::2].mean(1)).statistic
    scores = {name: [record["in_loop"][name] for record in records] for name in records[0]["in_loop"]}
    return {
        "maps": len(records),
        "correlation": {name: float(stats.spearmanr(score, after.mean(1)).statistic) for name, score in scores.items()},
        "reliability": float(2 * halves / (1 + halves)),
    }


def main(options):
    problem = load_problem(**ENVIRONMENTS[DEFAULT], sigma=options.sigma, training=options.training)
    settings = {name: getattr(options, name) for name in ("budgets", "sigma", "training", "steps", "n", "seed")}
    recipe = brief_recipe(problem, options.steps, options.seed)
    settings |= {"reward_version": REWARD_VERSION, "checkpoint": problem.card["digest"], "recipe": dataclasses.asdict(recipe)}
    lines = options.output / "maps.jsonl"
    records = read(lines, settings)
    wanted = [index for index in range(options.maps) if index not in {record["index"] for record in records}]
    if wanted:
        with engine_of(options) as engine:
            found = concurrent.futures.as_completed([engine.submit(do_map, options, index) for index in wanted])
            for future in tqdm(found, total=len(wanted), desc="maps", smoothing=0):
                records.append(future.result())
                with open(lines, "a", encoding="utf-8") as file:
                    file.write(json.dumps(records[-1]) + "\n")
    records = sorted((r for r in records if r["index"] < options.maps), key=lambda r: r["index"])
    document = {"settings": settings, "judging_images": JUDGES, "all": agreement(records)}
    for budget in options.budgets:
        document[f"budget {budget:g}"] = agreement([r for r in records if r["budget"] == budget])
    document["in_loop_seconds"] = {
        name: float(np.median([r["in_loop_seconds"][name] for r in records])) for name in records[0]["in_loop_seconds"]
    }
    write_json(options.output / "agreement.json", document | {"provenance": provenance()})
    for part, table in document.items():
        if isinstance(table, dict) and "correlation" in table:
            print(f"{part}: {table['maps']} maps, reliability of the finished score {table['reliability']:.2f}")
            for name, correlation in table["correlation"].items():
                print(f"  {name}: {correlation:.2f}")


def read(lines: Path, settings: dict) -> list[dict]:
    """The maps that are done; the first line says under which settings.

    :raises ArqError: when they were made under others
    """
    if not lines.exists():
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.write_text(json.dumps(settings) + "\n")
    drop_partial_line(lines)
    first, *rest = (json.loads(line) for line in lines.read_text().splitlines())
    if first != json.loads(json.dumps(settings)):
        raise ArqError(f"{lines} was made with other settings: choose another --output")
    return rest


if __name__ == "__main__":
    command_line.run(main, options)
