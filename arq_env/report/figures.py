"""Charts of runs in Vega-Lite, through Altair: one definition makes the page's and the PNG's.

Drawn as SVG, whose ink is the page's own text colour, so that a chart follows the reader's light or dark scheme. Colours are of the
palette of Okabe and Ito, told apart by colour-blind readers, in the order in which they keep a contrast of 3 on white and on black;
lines also differ in dashes, points in shape.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import altair as alt
import numpy as np
from scipy import stats

from arq_env.bitwidths import MAX_BITS
from arq_env.certification import Certificates
from arq_env.report.run import Certified, Run, Tried

Layered = alt.LayerChart | alt.FacetChart
INK = "currentColor"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#AA8800", "#56B4E9")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [10, 4], [4, 4])
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
#: Height of a chart, in pixels.
HEIGHT = 240
#: Lower bounds on the probability of the top class are counted in bins of this width, from 1/2.
BIN = 0.05

_PERCENT = alt.Axis(format="~%")


def bits(layers: Sequence[dict]) -> tuple[alt.Chart, alt.Chart]:
    """Two charts to stand one above the other: weight and activation bits of each layer, and its share of the map's BOPs."""
    costs = [layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in layers]
    rows = [
        {
            "layer": layer["name"],
            "kind": f"{kind} bits",
            "bits": layer[f"{kind}_bits"],
            "weight bits": layer["weight_bits"],
            "activation bits": layer["activation_bits"],
            "share of BOPs": cost / sum(costs),
            "multiply-accumulates": layer["macs"],
            "weights": layer["parameters"],
        }
        for layer, cost in zip(layers, costs, strict=True)
        for kind in ("weight", "activation")
    ]
    told = _told(
        {
            "layer": None,
            "weight bits": "d",
            "activation bits": "d",
            "share of BOPs": ".2%",
            "multiply-accumulates": ",",
            "weights": ",",
        }
    )
    order = [layer["name"] for layer in layers]
    wide = 44  # of both vertical axes, so that the two charts stand flush
    above = alt.Chart(alt.Data(values=rows), height=200).mark_bar()
    above = above.encode(
        alt.X("layer:N", sort=order, axis=alt.Axis(labels=False, ticks=False, title=None)),
        alt.Y(
            "bits:Q",
            scale=alt.Scale(domain=[0, MAX_BITS]),
            axis=alt.Axis(tickCount=4, title="bits", minExtent=wide, maxExtent=wide),
        ),
        alt.XOffset("kind:N", sort=["weight bits", "activation bits"]),
        _colour("kind", ["weight bits", "activation bits"]),
        tooltip=told,
    )
    below = alt.Chart(alt.Data(values=rows[::2]), height=90).mark_bar(color=INK, opacity=0.6)
    below = below.encode(
        alt.X("layer:N", sort=order, axis=alt.Axis(labelAngle=-90, labelLimit=130, title=None)),
        alt.Y("share of BOPs:Q", axis=alt.Axis(format="~%", tickCount=3, title="share of BOPs", minExtent=wide, maxExtent=wide)),
        tooltip=told,
    )
    return above, below


def rewards(episodes: Sequence[Tried]) -> Layered:
    """Each episode's reward, and the best so far."""
    best = np.maximum.accumulate([episode.reward for episode in episodes])
    rows = [_episode(episode) | {"best so far": float(b)} for episode, b in zip(episodes, best, strict=True)]
    data, y = alt.Chart(alt.Data(values=rows), height=HEIGHT), alt.Scale(zero=False)
    points = data.mark_point(color=COLOURS[0], filled=True, size=30)
    line = data.mark_line(color=INK, interpolate="step-after")
    return line.encode(_over("episode"), alt.Y("best so far:Q", scale=y, title="reward")) + points.encode(
        _over("episode"), alt.Y("reward:Q", scale=y, title="reward"), tooltip=_told(_EPISODE)
    )


def radii(episodes: Sequence[Tried]) -> Layered:
    """Each episode's ACR under the reward's certifier, and that of FP32."""
    rows = [_episode(episode) for episode in episodes]
    data, y = alt.Chart(alt.Data(values=rows), height=HEIGHT), alt.Scale(zero=False)
    points = data.mark_point(color=COLOURS[0], filled=True, size=30)
    rule = data.mark_line(color=INK, strokeDash=DASHES[1])
    return rule.encode(_over("episode"), alt.Y("ACR of FP32:Q", scale=y, title="ACR")) + points.encode(
        _over("episode"), alt.Y("ACR:Q", scale=y, title="ACR"), tooltip=_told(_EPISODE)
    )


def budget(episodes: Sequence[Tried], limit: float | None, exported: int | None) -> Layered:
    """BOPs of each map tried, against its ACR over FP32's; the budget as a line, the exported map ringed."""
    rows = [_episode(episode) for episode in episodes]
    x = alt.X("BOPs of FP32:Q", scale=alt.Scale(zero=False), axis=alt.Axis(format=".2~%", tickCount=5))
    y = alt.Y("ACR over FP32:Q", scale=alt.Scale(zero=False))
    tried = alt.Chart(alt.Data(values=rows), height=HEIGHT).mark_point(filled=True, size=30, color=COLOURS[0])
    layers = [tried.encode(x, y, tooltip=_told(_EPISODE))]
    chosen = [row for row in rows if row["episode"] == exported]
    if chosen:
        ring = alt.Chart(alt.Data(values=chosen)).mark_point(size=160, color=COLOURS[1], strokeWidth=2.5)
        layers.append(ring.encode(x, y, tooltip=_told(_EPISODE)))
    if limit is not None:
        rule = alt.Chart(alt.Data(values=[{"BOPs of FP32": limit, "is": "the budget"}])).mark_rule(color=INK, strokeDash=DASHES[1])
        layers.append(rule.encode(x, tooltip=[alt.Tooltip("is:N"), alt.Tooltip("BOPs of FP32:Q", format=".4%")]))
    return alt.layer(*layers)


def seconds(episodes: Sequence[Tried]) -> alt.Chart:
    """Minutes since the search began, and what evaluations of new maps took of them, against episodes."""
    rows, evaluating, seen = [], 0.0, 0
    for episode in episodes:
        evaluating += episode.evaluation_seconds if episode.evaluations > seen else 0.0
        seen = episode.evaluations
        rows.append({"episode": episode.episode, "time": "in all", "minutes": episode.seconds / 60})
        rows.append({"episode": episode.episode, "time": "evaluating maps", "minutes": evaluating / 60})
    lines = alt.Chart(alt.Data(values=rows), height=HEIGHT).mark_line(strokeWidth=2)
    kinds = ["in all", "evaluating maps"]
    told = _told({"time": None, "episode": "d", "minutes": ".1f"})
    return lines.encode(_over("episode"), alt.Y("minutes:Q"), *_lines("time", kinds), tooltip=told)


def certified_accuracy(networks: Sequence[tuple[str, Certified]]) -> Layered:
    """Certified accuracy against radius, a line for each named network; the line under the pointer tells all at its radius."""
    names = [name for name, _ in networks]
    rows = [
        {"network": name, "column": f"network {i}", "radius": round(radius, 4), "certified accuracy": share}
        for i, (name, network) in enumerate(networks)
        for radius, share in network.curve
    ]
    data = alt.Chart(alt.Data(values=rows), height=HEIGHT + 40)
    x, y = alt.X("radius:Q", title="L2 radius"), alt.Y("certified accuracy:Q", axis=_PERCENT, scale=alt.Scale(domainMin=0))
    lines = data.mark_line(strokeWidth=2).encode(x, y, *_lines("network", names))
    near = alt.selection_point(nearest=True, on="pointerover", fields=["radius"], empty=False)
    points = data.mark_point(filled=True, size=50).encode(
        x, y, _lines("network", names)[0], opacity=alt.when(near).then(alt.value(1)).otherwise(alt.value(0))
    )
    rule = (
        data.transform_pivot("column", value="certified accuracy", groupby=["radius"])
        .mark_rule(color=INK)
        .encode(
            x,
            opacity=alt.when(near).then(alt.value(0.4)).otherwise(alt.value(0)),
            tooltip=[
                alt.Tooltip("radius:Q", format=".3f"),
                *(alt.Tooltip(f"network {i}:Q", title=name, format=".1%") for i, name in enumerate(names)),
            ],
        )
        .add_params(near)
    )
    return alt.layer(lines, points, rule)


def probabilities(networks: Sequence[tuple[str, Certificates, float]]) -> alt.Chart:
    """How many images have which lower bound on the probability of the top class, p_A = Phi(radius / sigma), where it is right.

    :param networks: name, certificates, sigma
    """
    names, rows = [name for name, *_ in networks], []
    edges = np.arange(0.5, 1 + BIN / 2, BIN)
    for name, table, sigma in networks:
        lower = stats.norm.cdf(table.certified_radius[table.correct] / sigma)
        counts = np.histogram(np.minimum(lower, 1), edges)[0]
        for start, count in zip(edges, counts, strict=False):
            rows.append({"network": name, "from": f"{start:.2f}", "images": int(count), "p_A": f"{start:.2f} to {start + BIN:.2f}"})
    bars = alt.Chart(alt.Data(values=rows), height=HEIGHT + 40).mark_bar()
    return bars.encode(
        alt.X("from:O", title="lower bound on p_A, from", axis=alt.Axis(labelAngle=0, labelOverlap="greedy", labelSeparation=8)),
        alt.Y("images:Q", axis=alt.Axis(tickMinStep=1)),
        alt.XOffset("network:N", sort=names),
        _colour("network", names),
        tooltip=_told({"network": None, "p_A": None, "images": "d"}),
    )


def progress(runs: Sequence[Run], kinds: Sequence[str]) -> alt.Chart:
    """Best reward so far against maps evaluated, a line for each run, coloured by what kind of search it is."""
    rows: list[dict] = []
    for run, kind in zip(runs, kinds, strict=True):
        best = np.maximum.accumulate([episode.reward for episode in run.episodes]) if run.episodes else ()
        rows += [
            {"run": run.name, "search": kind, "maps evaluated": episode.evaluations, "best reward so far": float(b)}
            for episode, b in zip(run.episodes, best, strict=True)
        ]
    names = list(dict.fromkeys(row["search"] for row in rows))
    lines = alt.Chart(alt.Data(values=rows), height=HEIGHT + 60).mark_line(
        interpolate="step-after", opacity=0.8 if len(names) <= len(COLOURS) else 0.4
    )
    told = _told({"run": None, "search": None, "maps evaluated": "d", "best reward so far": ".4f"})
    y, kinds = alt.Y("best reward so far:Q", scale=alt.Scale(zero=False)), _kinds(_lines, "search", names)
    return lines.encode(_over("maps evaluated"), y, *kinds, detail="run:N", tooltip=told)


def pareto(rows: Sequence[dict], y: str, reference: float | None) -> Layered:
    """BOPs against a value, a point a run with its standard error; the line is of those that no cheaper run exceeds.

    :param rows: ``run, kind, BOPs of FP32, value``, and ``standard error`` where there is one
    :param y: what the value is called
    :param reference: the value of FP32, as a dashed line
    """
    names = list(dict.fromkeys(row["kind"] for row in rows))
    rows = [
        row | {end: row["value"] + sign * row.get("standard error", 0) for end, sign in (("low", -1), ("high", 1))} for row in rows
    ]
    x = _shares(row["BOPs of FP32"] for row in rows)
    value, colour = alt.Y("value:Q", scale=alt.Scale(zero=False), title=y), _kinds(_points, "kind", names)
    told = _told({"run": None, "kind": None, "BOPs of FP32": ".3%", "value": ".4f", "standard error": ".4f"})
    data = alt.Chart(alt.Data(values=rows), height=HEIGHT + 60)
    line = alt.Chart(alt.Data(values=front(rows))).mark_line(color=INK, interpolate="step-after", opacity=0.6)
    layers = [
        line.encode(x, value),
        data.mark_rule(opacity=0.5).encode(x, alt.Y("low:Q", title=y), alt.Y2("high:Q"), colour[0]),
        data.mark_point(filled=True, size=80, opacity=1).encode(x, value, *colour, tooltip=told),
    ]
    if reference is not None:
        rule = alt.Chart(alt.Data(values=[{"value": reference, "is": "FP32"}])).mark_rule(color=INK, strokeDash=DASHES[1])
        layers.append(rule.encode(value, tooltip=_told({"is": None, "value": ".4f"})))
    return alt.layer(*layers)


def _shares(shown: Iterable[float]) -> alt.X:
    """An axis of fractions as percentages: logarithmic where they differ by more than a factor of two, with few round labels."""
    shown = sorted(shown)
    if shown[-1] < 2 * shown[0]:
        return alt.X("BOPs of FP32:Q", scale=alt.Scale(zero=False, padding=20), axis=alt.Axis(format=".3~%", tickCount=4))
    marks = [step * 10.0**power for power in range(-5, 1) for step in (1, 2, 3, 5)]
    axis = alt.Axis(format=".2~%", values=[mark for mark in marks if 0.8 * shown[0] <= mark <= 1.25 * shown[-1]])
    return alt.X("BOPs of FP32:Q", scale=alt.Scale(type="log", nice=False, padding=20), axis=axis)


def front(rows: Sequence[dict]) -> list[dict]:
    """The rows whose value no other reaches with as few BOPs, cheapest first."""
    best: list[dict] = []
    for row in sorted(rows, key=lambda row: (row["BOPs of FP32"], -row["value"])):
        if not best or row["value"] > best[-1]["value"]:
            best.append(row)
    return best


def _episode(episode: Tried) -> dict:
    return {
        "episode": episode.episode,
        "reward": episode.reward,
        "ACR": episode.acr,
        "ACR of FP32": episode.reference_acr,
        "ACR over FP32": episode.acr / episode.reference_acr,
        "BOPs of FP32": episode.bops_fraction,
    }


_EPISODE = {"episode": "d", "reward": ".4f", "ACR": ".4f", "ACR over FP32": ".4f", "BOPs of FP32": ".4%"}


def _told(shown: Mapping[str, str | None]) -> list[alt.Tooltip]:
    """Tooltips: each field with the format of its numbers, or None where it is text."""
    return [
        alt.Tooltip(f"{name}:N", title=name) if shape is None else alt.Tooltip(f"{name}:Q", title=name, format=shape)
        for name, shape in shown.items()
    ]


def _over(name: str) -> alt.X:
    return alt.X(f"{name}:Q", axis=alt.Axis(tickMinStep=1), scale=alt.Scale(nice=False, padding=8))


def _range(names: Sequence[str]) -> list[str]:
    """A colour for each name; FP32, which comes first where it is, in the text's colour."""
    inked = [INK] if names and names[0] == "FP32" else []
    return [*inked, *COLOURS][: len(names)]


def _kinds(channels: Callable, field: str, names: Sequence[str]) -> tuple:
    """The channels for as many kinds as there are colours; more are told apart by the pointer alone."""
    return (alt.ColorValue(INK),) if len(names) > len(COLOURS) else channels(field, names)


def _legend(**changes) -> alt.Legend:
    return alt.Legend(title=None, orient="top", columns=2, labelLimit=150, symbolOpacity=1, **changes)


def _colour(field: str, names: Sequence[str]) -> alt.Color:
    return alt.Color(f"{field}:N", scale=alt.Scale(domain=list(names), range=_range(names)), legend=_legend())


def _lines(field: str, names: Sequence[str]) -> tuple[alt.Color, alt.StrokeDash]:
    """Colours and dashes, with one legend of lines."""
    legend = _legend(symbolType="stroke", symbolSize=300)
    dashes = alt.Scale(domain=list(names), range=list(DASHES[: len(names)]))
    colours = alt.Scale(domain=list(names), range=_range(names))
    return alt.Color(f"{field}:N", scale=colours, legend=legend), alt.StrokeDash(f"{field}:N", scale=dashes, legend=legend)


def _points(field: str, names: Sequence[str]) -> tuple[alt.Color, alt.Shape]:
    """Colours and shapes, with one legend of points."""
    shapes = alt.Scale(domain=list(names), range=list(SHAPES[: len(names)]))
    return _colour(field, names), alt.Shape(f"{field}:N", scale=shapes, legend=_legend())


def themed(chart, ink: str, title: str | None = None) -> dict:
    """A chart as a Vega-Lite document, in one ink.

    :param ink: of text and axes
    :param title: drawn above it
    """
    axis = {"labelColor": ink, "titleColor": ink, "gridColor": ink, "gridOpacity": 0.15, "domainColor": ink, "tickColor": ink}
    text = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    chart = chart if title is None else chart.properties(title=title, padding=12)
    chart = chart.configure(background="transparent" if ink == INK else "white", font="system-ui, sans-serif")
    chart = chart.configure_axis(**axis, **text).configure_view(stroke=None, clip=False)
    chart = chart.configure_legend(labelColor=ink, titleColor=ink, labelFontSize=12, symbolStrokeWidth=2)
    return _inked(chart.configure_title(color=ink, anchor="start", fontSize=14).to_dict(), ink)


def _inked(part, ink: str):
    """The same with this ink in place of the page's, wherever it stands."""
    if isinstance(part, dict):
        return {key: _inked(value, ink) for key, value in part.items()}
    if isinstance(part, list):
        return [_inked(value, ink) for value in part]
    return ink if part == INK else part
