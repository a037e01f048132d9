"""Run every search on one problem at equal cost, several seeds each, and draw their best reward against evaluations.

An evaluation is one map quantized and certified on the reward images. A map met again is counted but costs no time, also when
another search below --output met it first; what a search measures before its first map is counted in evaluations too. Stop it
at any time: the same command goes on.
"""

import json
import multiprocessing
import os
import signal
import threading
from multiprocessing import connection
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from agents.baselines import WITH_OPTUNA, import_optuna
from agents.compare import DETERMINISTIC, METHODS, best_so_far, reaches, run_search, setup_cost
from agents.main import add_environment, make_env
from agents.trace import count_episodes, read_trace
from arq_env import ArqError, command_line
from arq_env.files import write_json
from arq_env.provenance import provenance


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=command_line.whole(1), default=3, help="runs of each search that draws at random")
    parser.add_argument("--episodes", type=command_line.whole(2), default=200, help="evaluations a search may make")
    add_environment(parser, budget=0.007, training="consistency")
    command_line.add_processes(parser, "searches")
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="folder for runs, table and plot")
    options = parser.parse_args()
    for method in options.methods:
        if method not in METHODS:
            raise ArqError(f"there is no search {method!r}: choose of {', '.join(METHODS)}")
        if method in WITH_OPTUNA:
            import_optuna()
    return options


def main():
    options = parse()
    env = make_env(options)  # before any worker starts, so that mistakes come first
    runs = [
        (method, seed) for seed in range(options.seeds) for method in options.methods if not seed or method not in DETERMINISTIC
    ]
    folders = {run: options.output / f"budget{options.budget:g}" / "{}-seed{}".format(*run) for run in runs}
    # leaving the block ends the workers at once, also for Ctrl-C or an error
    with (
        multiprocessing.get_context("spawn").Pool(options.processes, start_worker, maxtasksperchild=1) as pool,
        tqdm(total=len(runs) * options.episodes, unit="evaluation") as bar,
    ):
        searches = [pool.apply_async(search_one, (run, folders[run], options)) for run in runs]
        while searches:
            searches[0].wait(2)
            for search in [search for search in searches if search.ready()]:
                search.get()  # raises what it ended with
                searches.remove(search)
            bar.n = sum(count_episodes(folder / "trace.jsonl") for folder in folders.values())
            bar.refresh()
    document = summary(env, folders, options)
    name = f"comparison-budget{options.budget:g}"
    write_json(options.output / f"{name}.json", document)
    plot(document, options.output / f"{name}.png")
    print(table(document))


def start_worker() -> None:
    """One thread, no part in Ctrl-C, and no life without the parent, so that nothing runs on beside its own repetition."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def search_one(run, folder: Path, options) -> None:
    """One search in a worker process."""
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


def summary(env, folders: dict, options) -> dict:
    """The searches' curves, and where each ended."""
    methods = {}
    for method in options.methods:
        setup = setup_cost(method, env)
        traces = {seed: read_trace(folder / "trace.jsonl") for (name, seed), folder in folders.items() if name == method}
        curves = np.stack([best_so_far(trace, options.episodes, setup) for trace in traces.values()])
        exported = [json.loads((folders[method, seed] / "bit_widths.json").read_text())["metrics"] for seed in traces]
        methods[method] = {
            "setup_evaluations": setup,
            "proposed_maps": [len(trace) for trace in traces.values()],
            "distinct_maps": [trace[-1].evaluations for trace in traces.values()],
            "best_reward": curves[:, -1].tolist(),
            "confirmed_ratio": [confirmed_ratio(metrics) for metrics in exported],
            "mean": [None if np.isnan(value) else value for value in curves.mean(0).tolist()],
            "standard_error": standard_error(curves).tolist(),
        }
    if "random" in methods:
        goal = methods["random"]["mean"][-1]
        for found in methods.values():
            found["evaluations_to_random_s_reward"] = reaches(np.array(found["mean"], float), goal)
    settings = {name: getattr(options, name) for name in ("env", "budget", "sigma", "training", "episodes", "seeds")}
    return {"settings": settings, "methods": methods, "provenance": provenance()}


def confirmed_ratio(metrics: dict) -> float | None:
    """ACR over FP32's of an exported map, on the images that chose it among the five best and not on those of the search."""
    return metrics["confirmed_acr"] / metrics["confirmed_reference_acr"] if "confirmed_acr" in metrics else None


def standard_error(curves: np.ndarray) -> np.ndarray:
    """Over the runs; 0 for a search that has but one outcome."""
    curves = np.nan_to_num(curves)
    return curves.std(0, ddof=1) / np.sqrt(len(curves)) if len(curves) > 1 else np.zeros(curves.shape[1])


def table(document: dict) -> str:
    """One line a search, as Markdown, sorted by the ratio on other images: the best of many scores is in part luck."""
    rows = [
        "| search | evaluations before | distinct maps | best reward in the search | to random's | ACR of FP32 on other images |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    methods = document["methods"].items()
    for method, found in sorted(methods, key=lambda item: -np.mean([ratio or 0 for ratio in item[1]["confirmed_ratio"]])):
        last = found["mean"][-1]
        reward = "no map yet" if last is None else f"{last:.3f} +- {found['standard_error'][-1]:.3f}"
        distinct, reached = np.mean(found["distinct_maps"]), found.get("evaluations_to_random_s_reward")
        ratios = [ratio for ratio in found["confirmed_ratio"] if ratio is not None]
        confirmed = f"{np.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})" if ratios else ""
        before = f"{found['setup_evaluations']:.0f}"
        rows.append(f"| {method} | {before} | {distinct:.0f} | {reward} | {reached or 'not reached'} | {confirmed} |")
    return "\n".join(rows)


def plot(document: dict, path: Path) -> None:
    """Mean of the best reward so far against evaluations, with a band of one standard error."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for method, found in document["methods"].items():
        mean, error = np.array(found["mean"], float), np.array(found["standard_error"])
        evaluations = np.arange(1, len(mean) + 1)
        (line,) = axes.plot(evaluations, mean, label=method, linestyle="--" if method in DETERMINISTIC else "-")
        axes.fill_between(evaluations, mean - error, mean + error, alpha=0.2, color=line.get_color(), linewidth=0)
    settings = document["settings"]
    axes.set(xlabel="evaluations", ylabel="best reward so far", title=f"{settings['env']}, {settings['budget']:.3%} of FP32's BOPs")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    command_line.run(main)
