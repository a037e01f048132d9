"""Run every search on one problem at equal cost, several seeds each, and finish every map that they export.

An evaluation is one map quantized and judged on the reward images. A map met again is counted but costs no time, also when
another search below --output met it first; what a search measures before its first map is counted in evaluations too. The maps
that the searches export are then fine-tuned by one short recipe and certified on test images, beside FP32 after the same recipe:
a search can win its reward and lose the network. Intervals of rewards are Student's, of 95%; those of differences between fresh
rewards, in the figures' file, are Welch's and hold for all pairs at once. Stop it at any time: the same command goes on.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    from arq_agents.methods import COMPARED, split_method

    parser = command_line.parser(__doc__)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(COMPARED),
        metavar="METHOD",
        help="searches, each with what agents/levers.py adds, such as td3+features",
    )
    parser.add_argument("--seeds", type=shared_options.whole(1), default=5, help="runs of each search that draws at random")
    parser.add_argument("--episodes", type=shared_options.whole(2), default=200, help="evaluations a search may make")
    shared_options.add_environment(parser, budget=0.007, training="consistency", regained_bits=1)
    shared_options.add_engine(parser, "searches")
    shared_options.add_finishing(parser)
    parser.add_argument("--rewards-only", action="store_true", help="finish no map")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder for runs, figures and plot")
    parser.add_argument("--name", default="comparison", help="of figures and plot there, before the budget")
    options = parser.parse_args()
    options.methods = list(dict.fromkeys(options.methods))
    for method in options.methods:
        split_method(method)  # mistakes first
    return options


options = command_line.start(__name__, parse)

import math
from concurrent.futures import FIRST_COMPLETED, wait

import matplotlib
import numpy as np
from scipy import stats
from tqdm import tqdm

from arq_agents.baselines import import_optuna
from arq_agents.equal_cost import best_so_far, difference_of_means, half_width, is_deterministic, reaches, run_search, setup_cost
from arq_agents.finishing import finish
from arq_agents.main import engine_of, make_env
from arq_agents.methods import WITH_OPTUNA, split_method
from arq_agents.trace import count_episodes, read_trace
from arq_env import ArqError
from arq_env.bitwidths import load_map
from arq_env.comparison import FP32, ratio_of_means
from arq_env.env import arq_env_of
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance


def main(options):
    if any(split_method(method)[0] in WITH_OPTUNA for method in options.methods):
        import_optuna()
    env = make_env(options)  # before any worker starts, so that mistakes come first
    for method in options.methods:
        if options.episodes <= (setup := math.ceil(setup_cost(method, env))):
            raise ArqError(f"{method} measures {setup} evaluations' worth before its first map: give --episodes more than that")
    runs = [
        (method, seed) for seed in range(options.seeds) for method in options.methods if not seed or not is_deterministic(method)
    ]
    folders = {
        run: options.output / f"budget{shared_options.budget_name(options.budget)}" / "{}-seed{}".format(*run) for run in runs
    }
    with engine_of(options) as engine:
        with tqdm(total=len(runs) * options.episodes, unit="evaluation") as bar:
            searches = {engine.submit(search_one, run, folders[run], options) for run in runs}
            while searches:
                done, searches = wait(searches, timeout=2, return_when=FIRST_COMPLETED)
                for search in done:
                    search.result()  # raises what it ended with
                bar.n = sum(count_episodes(folder / "trace.jsonl") for folder in folders.values())
                bar.refresh()
        exported = {run: load_map(folder / "bit_widths.json", arq_env_of(env).layers)[0] for run, folder in folders.items()}
        finished = {} if options.rewards_only else finish(engine, {FP32: None, **exported}, options, store=options.output)
    document = summary(env, folders, finished, options)
    name = f"{options.name}-budget{shared_options.budget_name(options.budget)}"
    write_json(options.output / f"{name}.json", document)
    plot(document, options.output / f"{name}.png")
    print(table(document))


def search_one(run, folder: Path, options) -> None:
    """One search, in a worker."""
    method, seed = run
    run_search(
        method,
        make_env(options),
        seed=seed,
        episodes=options.episodes,
        folder=folder,
        store=options.output,
        config={"env": options.env},
    )


def summary(env, folders: dict, finished: dict, options) -> dict:
    """The searches' curves, where each ended, and what its maps are worth when finished.

    :param finished: radii of each run's map and of FP32, or nothing
    """
    methods, layers = {}, arq_env_of(env).layers
    for method in options.methods:
        setup = setup_cost(method, env)
        traces = {seed: read_trace(folder / "trace.jsonl") for (name, seed), folder in folders.items() if name == method}
        curves = np.stack([best_so_far(trace, options.episodes, setup) for trace in traces.values()])
        exported = [load_map(folders[method, seed] / "bit_widths.json", layers)[1]["metrics"] for seed in traces]
        methods[method] = {
            "setup_evaluations": setup,
            "proposed_maps": [len(trace) for trace in traces.values()],
            "distinct_maps": [trace[-1].evaluations for trace in traces.values()],
            "best_reward": curves[:, -1].tolist(),
            "best_reward_half_width": half_width(curves[:, -1]),
            "exported_reward": [metrics["reward"] for metrics in exported],
            "fresh_reward": [metrics["fresh_reward"] for metrics in exported],
            "fresh_reward_half_width": half_width([metrics["fresh_reward"] for metrics in exported]),
            "mean": [None if np.isnan(value) else value for value in curves.mean(0).tolist()],
            "standard_error": standard_error(curves).tolist(),
        }
    pairs = max(len(methods) * (len(methods) - 1) // 2, 1)
    for method, found in methods.items():
        found["fresh_reward_less_that_of"] = {
            other: difference_of_means(found["fresh_reward"], methods[other]["fresh_reward"], pairs)
            for other in methods
            if other != method
        }
    if "random" in methods:
        goal = methods["random"]["mean"][-1]
        for found in methods.values():
            found["evaluations_to_random_s_reward"] = reaches(np.array(found["mean"], float), goal)
    names = ("env", "budget", "sigma", "training", "regained_bits", "episodes", "seeds", "steps", "every", "n")
    settings = {name: getattr(options, name) for name in names} | shared_options.own_arguments(options)
    settings |= {name: value for name in ("fix", "bits", "weights") if (value := getattr(options, name, None)) is not None}
    agreement = add_finished(methods, finished) if finished else {}
    return {"settings": settings, **agreement, "methods": methods, "provenance": provenance()}


def add_finished(methods: dict, finished: dict) -> dict:
    """Add to each method what its maps are worth when finished, against FP32 and each other; return what concerns all."""
    fp32 = finished[FP32]
    over_seeds = {m: np.stack([radii for run, radii in finished.items() if run != FP32 and run[0] == m]) for m in methods}
    for method, found in methods.items():
        found["finished_ratio"] = (over_seeds[method].mean(1) / fp32.mean()).tolist()
        found["finished"] = difference(over_seeds[method], fp32[None], fp32)
        found["finished_against"] = {
            other: difference(over_seeds[method], over_seeds[other], fp32) for other in methods if other != method
        }
    pairs = {pair for m in methods.values() for pair in zip(m["exported_reward"], m["finished_ratio"], strict=True)}
    agreement = float(stats.spearmanr(*zip(*pairs, strict=True))[0]) if len(pairs) > 2 else None
    return {"fp32_finished_acr": float(fp32.mean()), "spearman_of_exported_reward_and_finished_ratio": agreement}


def difference(a: np.ndarray, b: np.ndarray, fp32: np.ndarray) -> dict:
    """Mean over seeds and images of a's radius less b's, over FP32's ACR, with the standard error that both kinds of luck give.

    :param a: radii [seeds of a, images]; ``b`` likewise
    """
    ratio, over_images = ratio_of_means(a.mean(0) - b.mean(0), fp32)
    seeds = sum(runs.mean(1).var(ddof=1) / len(runs) for runs in (a, b) if len(runs) > 1) / fp32.mean() ** 2
    return {"mean": ratio, "standard_error": float(np.sqrt(over_images**2 + seeds))}


def standard_error(curves: np.ndarray) -> np.ndarray:
    """Over the runs; 0 for a search that has but one outcome."""
    curves = np.nan_to_num(curves)
    return curves.std(0, ddof=1) / np.sqrt(len(curves)) if len(curves) > 1 else np.zeros(curves.shape[1])


def table(document: dict) -> str:
    """One line a search, as Markdown, sorted by what its maps are worth when finished (a best score is in part luck), if known."""
    rows = [
        "| search | evaluations before the first map | distinct maps | best reward | evaluations to random's "
        "| reward of the exported map | on fresh draws | finished: over FP32 finished alike | seeds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def worth(item):
        _, found = item
        return found["finished"]["mean"] if "finished" in found else np.mean(found["best_reward"])

    for method, found in sorted(document["methods"].items(), key=worth, reverse=True):
        reward = with_interval(found["mean"][-1], found["best_reward_half_width"])
        distinct, reached = np.mean(found["distinct_maps"]), found.get("evaluations_to_random_s_reward", "")
        fresh = with_interval(np.mean(found["fresh_reward"]), found["fresh_reward_half_width"])
        finished = seeds = ""
        if "finished" in found:
            finished = f"{1 + found['finished']['mean']:.3f} +- {found['finished']['standard_error']:.3f}"
            seeds = ", ".join(f"{ratio:.3f}" for ratio in found["finished_ratio"])
        before = f"{found['setup_evaluations']:.0f}"
        reached = "not reached" if reached is None else reached
        own = f"{np.mean(found['exported_reward']):.3f}"
        rows.append(f"| {method} | {before} | {distinct:.0f} | {reward} | {reached} | {own} | {fresh} | {finished} | {seeds} |")
    return "\n".join(rows)


def with_interval(mean: float, half: float | None) -> str:
    """A mean over runs, with half of its 95% confidence interval where there are several."""
    return f"{mean:.3f}" + ("" if half is None else f" +- {half:.3f}")


def plot(document: dict, path: Path) -> None:
    """Mean of the best reward so far against evaluations, with a band of one standard error."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    for method, found in document["methods"].items():
        mean, error = np.array(found["mean"], float), np.array(found["standard_error"])
        evaluations = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(evaluations, mean, label=method, linestyle="--" if is_deterministic(method) else "-")
        axes.fill_between(evaluations, mean - error, mean + error, alpha=0.2, color=line.get_color(), linewidth=0)
    settings, budget = document["settings"], document["settings"]["budget"]
    limit = f"{budget:.3%} of FP32's BOPs" if isinstance(budget, float) else shared_options.budget_name(budget)
    axes.set(xlabel="evaluations", ylabel="best reward so far", title=f"{settings['env']}, {limit}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command_line.run(main, options)
