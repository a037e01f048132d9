"""What the page of several runs shows."""

import os
from collections.abc import Sequence
from dataclasses import replace

from arq_env.comparison import FP32
from arq_env.report import figures
from arq_env.report.run import Run, figures_of
from arq_env.report.section import Section, duration
from arq_env.support.settings import UNIFORM

#: What runs must share for their rewards to be compared.
_REWARDED_ALIKE = ("network", "data", "sigma", "certifier", "reward_version")


def title(runs: Sequence[Run]) -> tuple[str, str]:
    """Heading and the line under it."""
    alike = {
        key: known.pop() for key in ("network", "dataset", "sigma") if len(known := {run.header.get(key) for run in runs}) == 1
    }
    told = [str(alike[key]) for key in ("network", "dataset") if alike.get(key) is not None]
    told += [f"noise sigma {alike['sigma']:g}"] if alike.get("sigma") is not None else []
    return f"{len(runs)} runs compared", ", ".join(told)


def named(runs: Sequence[Run]) -> list[Run]:
    """The runs with short names: without what all have in common up to a dash or a slash, and a number where two are the same."""
    names = [run.name for run in runs]
    common = os.path.commonprefix(names)
    cut = max(common.rfind("-"), common.rfind("/")) + 1
    short = [name[cut:] or name for name in names]
    return [
        replace(run, name=name if short.count(name) == 1 else f"{name} ({i})")
        for i, (run, name) in enumerate(zip(runs, short, strict=True), 1)
    ]


def sections(runs: Sequence[Run]) -> list[Section]:
    """All that can be compared, and a line for each thing that cannot."""
    return [_table(runs), _pareto(runs), _progress(runs), _accuracy(runs)]


def kind(run: Run) -> str:
    """What found the map: the search; of a folder of ``finalize.py`` uniform bits, or a map."""
    if "algorithm" in run.config:
        return run.config["algorithm"]
    given = run.own.figures.get("map", "") if run.own is not None else ""
    return FP32 if given == FP32 else "uniform" if UNIFORM.fullmatch(given) else "found"


def _certified_alike(run: Run) -> tuple | None:
    """What two runs must share for the ACRs of their networks to be compared."""
    if run.own is None or "dataset" not in run.header:
        return None
    settings = run.own.settings
    return run.header["dataset"], run.own.images, *(settings[key] for key in ("sigma", "n0", "n", "alpha", "seed"))


def _table(runs: Sequence[Run]) -> Section:
    first, rows = next((run.own for run in runs if run.own is not None), None), []
    for run in runs:
        own, against, shown = run.own, "", {}
        if own is not None:
            shown = figures_of(own)
            if own is not first:
                difference = None if first is None else own.difference(first)
                against = "{:+.4f} ± {:.4f}".format(*difference) if difference else "not paired"
        limit, last = run.limits.get("bops"), run.episodes[-1] if run.episodes else None
        size = own.figures.get("model_bytes") if own is not None else None
        rows.append(
            (
                run.name,
                "" if run.bops_fraction is None else f"{run.bops_fraction:.3%}",
                f"{run.bops_fraction / limit:.1%}" if limit and run.bops_fraction is not None else "",
                "" if size is None else f"{size:,}",
                f"{shown['acr']:.4f} ± {shown['acr_standard_error']:.4f}" if shown else "",
                f"{shown['clean_accuracy']:.1%}" if shown else "",
                against,
                f"{run.metrics['reward']:.4f}" if "reward" in run.metrics else "",
                f"{run.metrics['fresh_reward']:.4f}" if "fresh_reward" in run.metrics else "",
                f"{last.evaluations}" if last else "",
                duration(last.seconds) if last else "",
            )
        )
    paired = f"ACR − {next(run.name for run in runs if run.own is first)}'s, paired" if first is not None else "paired"
    head = (
        "run",
        "BOPs of FP32",
        "of its budget",
        "bytes",
        "ACR",
        "clean accuracy",
        paired,
        "reward",
        "fresh reward",
        "maps evaluated",
        "time",
    )
    caption = (
        "ACR: on test images, ± its standard error. Reward: of the exported map, as its search saw it; fresh: on draws that it "
    )
    return Section("Runs", caption=caption + "did not see. Empty: not in the folder.", wide=True).with_table(head, rows)


def _pareto(runs: Sequence[Run]) -> Section:
    said = Section("Pareto curve", "pareto", wide=True)
    placed = [run for run in runs if run.bops_fraction is not None and kind(run) != FP32]
    alike = {_certified_alike(run) for run in placed}
    if len(placed) > 1 and len(alike) == 1 and None not in alike:
        _by_certificates(said, placed, runs)
    elif len(placed) > 1 and all("reward" in run.metrics for run in placed):
        differing = [key for key in _REWARDED_ALIKE if len({repr(run.config.get(key)) for run in placed}) > 1]
        fresh = all("fresh_reward" in run.metrics for run in placed)
        name = "fresh reward" if fresh else "reward"
        if differing:
            said.missing = f"The runs differ in {', '.join(differing)}, so their rewards cannot be compared: no Pareto curve."
            return said
        rows = [_point(run) | {"value": run.metrics["fresh_reward" if fresh else "reward"]} for run in placed]
        said.charts = [figures.pareto(rows, name, None)]
        said.caption = (
            f"{name.capitalize()} of the exported map against its bit operations; the line joins maps that no cheaper one reaches."
        )
        said.caption += " No certificates on the same test images are in all of the folders."
    else:
        said.missing = "Fewer than two of the folders hold maps that were certified alike or rewarded alike: no Pareto curve."
    return said


def _by_certificates(said: Section, placed: Sequence[Run], runs: Sequence[Run]) -> None:
    """Draw ACRs with standard errors, over FP32's where that is on the same images: finished alike if there is one."""
    owns = [(run, run.own) for run in placed if run.own is not None]
    there = [network for run in runs for network in run.networks if network.name == FP32]
    there = [fp32 for fp32 in there if all(own.paired_with(fp32) for _, own in owns)]
    fp32 = max(there, key=lambda network: "recipe" in network.figures, default=None)
    rows = []
    for run, own in owns:
        shown, ratio = figures_of(own), None if fp32 is None else own.ratio(fp32)
        value, error = ratio or (shown["acr"], shown["acr_standard_error"])
        rows.append(_point(run) | {"value": value, "standard error": error})
    name, paired = ("ACR", "") if fp32 is None else ("ACR over FP32's", " (paired)")
    said.charts = [figures.pareto(rows, name, None if fp32 is None else 1.0)]
    said.caption = f"{name} on test images, with one standard error{paired}, against bit operations; the line joins maps that no "
    said.caption += "cheaper one reaches."


def _point(run: Run) -> dict:
    return {"run": run.name, "kind": kind(run), "BOPs of FP32": run.bops_fraction}


def _progress(runs: Sequence[Run]) -> Section:
    said, searched = Section("Searches", "searches", wide=True), [run for run in runs if run.episodes]
    if not searched:
        said.missing = "No trace.jsonl is in any of the folders, so nothing is shown of searches."
        return said
    if differing := [key for key in (*_REWARDED_ALIKE, "budget") if len({repr(run.config.get(key)) for run in searched}) > 1]:
        said.missing = f"The searches differ in {', '.join(differing)}, so their rewards cannot be compared."
        return said
    said.charts = [figures.progress(searched, [kind(run) for run in searched])]
    many = len({kind(run) for run in searched}) > len(figures.COLOURS)
    said.caption = "Best reward so far against maps evaluated, a line a run; "
    said.caption += "the pointer tells which." if many else "one colour for the seeds of one search."
    return said


def _accuracy(runs: Sequence[Run]) -> Section:
    said = Section("Certified accuracy", "certified_accuracy", wide=True)
    certified = [run for run in runs if run.own is not None]
    if not certified:
        said.missing = "No certificates are in any of the folders, so there is no certified accuracy to show."
    elif len({_certified_alike(run) for run in certified}) > 1:
        said.missing = (
            "The runs were certified on other images, or with other noise or samples: their certified accuracies are not compared."
        )
    elif len(certified) > len(figures.COLOURS):
        said.missing = (
            f"{len(certified)} runs are too many for one chart of certified accuracy: give at most {len(figures.COLOURS)}."
        )
    else:
        said.charts = [figures.certified_accuracy([(run.name, run.own) for run in certified if run.own is not None])]
        said.caption = "Share of test images that are predicted rightly with at least this radius (L2, pixels in [0, 1])."
    return said
