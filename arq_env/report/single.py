"""What the page of one run shows."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from arq_env.certification import Certificates
from arq_env.datasets.augment import as_tensor, to_float
from arq_env.report import figures
from arq_env.report.run import Certified, Run, figures_of
from arq_env.report.section import Datasets, Section, duration
from arq_env.report.tables import verdict
from arq_env.support.errors import ArqError
from arq_env.support.files import sha256

#: Images shown whose certificates changed most.
PICTURES = 12


def title(run: Run) -> tuple[str, str]:
    """Heading and the line under it."""
    known, what = run.header, run.config.get("env", "")
    if "network" in known and "dataset" in known:
        what = f"{known['network']} on {known['dataset']}"
    told = [f"noise sigma {known['sigma']:g}"] if "sigma" in known else []
    if run.limits:
        shown = {"bops": "{:.4%} of FP32's bit operations", "bytes": "{:,} bytes", "milliseconds": "{:g} ms"}
        told.append("budget " + " and ".join(shown[kind].format(limit) for kind, limit in run.limits.items() if kind in shown))
    if run.episodes:
        told.append(f"{len(run.episodes)} episodes")
    if "algorithm" in run.config:
        told.insert(0, f"searched by {run.config['algorithm']}")
    return f"{run.name}: {what}" if what else run.name, ", ".join(told)


def sections(run: Run, datasets: Datasets) -> list[Section]:
    """All that can be shown of a run, and a line for each thing that cannot."""
    return [
        _summary(run),
        _networks(run),
        _bits(run),
        *_search(run),
        _accuracy(run),
        _probabilities(run),
        _changed(run, datasets),
        _layers(run),
    ]


def _summary(run: Run) -> Section:
    """Figures that come first: tiles, and the sentence that says whether the map wins."""
    own, base = run.own, run.base
    tiles: list[dict] = []
    if own is not None:
        shown = figures_of(own)
        tiles.append({"name": f"ACR, {own.name}", "value": f"{shown['acr']:.4f}", "more": f"± {shown['acr_standard_error']:.4f}"})
        tiles.append({"name": "clean accuracy", "value": f"{shown['clean_accuracy']:.1%}", "more": _made_with(own)})
    if run.bops_fraction is not None:
        tiles.append(
            {"name": "bit operations", "value": f"{run.bops_fraction:.3%}"} | _used(run, "bops", run.bops_fraction, "of FP32's")
        )
    if own is not None and (size := own.figures.get("model_bytes")) is not None:
        tiles.append({"name": "size", "value": f"{size:,} bytes"} | _used(run, "bytes", size, "weights packed at their bits"))
    if run.episodes:
        last = run.episodes[-1]
        tiles.append({"name": "search", "value": duration(last.seconds), "more": f"{last.evaluations} maps evaluated"})
    found = next((network for network in run.networks if network.name == "found"), own)  # beside uniform bits, neither fine-tuned
    sentence = ""
    if found is not None and base is not None and found is not base and (known := _difference(run, found, base)):
        dear, cheap = (network.figures.get("bops_fraction") for network in (base, found))
        sentence = verdict(found.name, base.name, *known, dear / cheap if dear and cheap else 1.0)
    return Section("In short", caption=sentence, tiles=tiles, wide=True, missing="" if tiles else "No figures are in the folder.")


def _used(run: Run, kind: str, cost: float, otherwise: str) -> dict:
    """How much of the budget of a kind is used, as a tile has it; ``otherwise`` where it has no such limit."""
    if kind not in run.limits:
        return {"more": otherwise}
    return {"more": f"{cost / run.limits[kind]:.1%} of the budget", "share": cost / run.limits[kind]}


def _difference(run: Run, a: Certified, b: Certified) -> tuple[float, float] | None:
    """The paired difference of two ACRs, from tables or as the folder states it; None where neither tells."""
    if (paired := a.difference(b)) is not None:
        return paired
    for name, sign in ((f"{a.name} - {b.name}", 1), (f"{b.name} - {a.name}", -1)):
        if stated := run.differences.get(name):
            return sign * stated["mean"], stated["standard_error"]
    return None


def _networks(run: Run) -> Section:
    if not run.networks:
        return Section("Networks", missing="No certificates are in the folder: certify_map.py or finalize.py makes them.")
    base, rows = run.base, []
    for network in run.networks:
        shown, kept, against = figures_of(network), network.figures, ""
        if base is not None and network is not base:
            difference = _difference(run, network, base)
            against = "{:+.4f} ± {:.4f}".format(*difference) if difference else "not paired"
        size = kept.get("model_bytes")
        rows.append(
            (
                network.name,
                f"{shown['acr']:.4f} ± {shown['acr_standard_error']:.4f}",
                f"{shown['clean_accuracy']:.1%}",
                f"{kept['bops_fraction']:.3%}" if "bops_fraction" in kept else "",
                f"{size:,}" if size is not None else "",
                against,
            )
        )
    head = ("network", "ACR", "clean accuracy", "BOPs of FP32", "bytes", f"ACR − {base.name}, paired" if base else "")
    said = sorted({_made_with(network) for network in run.networks})
    caption = f"ACR: mean certified radius over test images, ± its standard error. Made with {'; and '.join(said)}."
    if any(row[-1] == "not paired" for row in rows):
        caption += " Not paired: certified on other images, or with other samples."
    return Section("Networks", caption=caption, wide=True).with_table(head, rows)


def _made_with(network: Certified) -> str:
    settings = network.settings
    images = len(network.table) if network.table is not None else network.figures.get("images", settings.get("images"))
    return f"{images} test images, n = {settings['n']:,}, alpha = {settings['alpha']:g}"


def _bits(run: Run) -> Section:
    said = Section("Bits of each layer", "bits", wide=True)
    if not run.layers:
        said.missing = "No bit_widths.json is in the folder, so there is no map to show."
        return said
    said.caption = (
        "Above, weight and activation bits; below, the layer's share of the map's bit operations: multiply-accumulates × "
    )
    said.caption += "weight bits × activation bits."
    said.charts = list(figures.bits(run.layers))
    return said


def _search(run: Run) -> list[Section]:
    """Reward, ACR, budget and time over episodes."""
    if not run.episodes:
        return [Section("Search", missing="No trace.jsonl is in the folder, so nothing is shown of a search.")]
    limit, exported = run.limits.get("bops"), run.metrics.get("episode")
    ringed = f" Ringed: the exported map, episode {exported}." if exported else ""
    return [
        Section(
            "Reward",
            "reward",
            "10 × (ACR over FP32's − 1) of each episode's map; the line is the best so far.",
            [figures.rewards(run.episodes)],
        ),
        Section(
            "ACR in the search", "acr", "By the reward's certifier, on reward images; dashed: FP32.", [figures.radii(run.episodes)]
        ),
        Section(
            "Use of the budget",
            "budget",
            f"Each map that was tried. {'Dashed: the budget.' if limit else 'The budget is not one of bit operations.'}{ringed}",
            [figures.budget(run.episodes, limit, exported)],
        ),
        Section(
            "Time",
            "time",
            "Since the search began, without pauses between a kill and going on; and what evaluating new maps took then.",
            [figures.seconds(run.episodes)],
        ),
    ]


def _accuracy(run: Run) -> Section:
    said = Section("Certified accuracy", "certified_accuracy")
    if not run.networks:
        said.missing = "No certificates are in the folder, so there is no certified accuracy to show."
        return said
    said.charts = [figures.certified_accuracy([(network.name, network) for network in run.networks])]
    said.caption = "Share of test images that are predicted rightly with at least this radius (L2, pixels in [0, 1])."
    if steps := [network.name for network in run.networks if network.table is None]:
        said.caption += f" {', '.join(steps)}: in steps of 0.25, as the folder has it."
    return said


def _probabilities(run: Run) -> Section:
    said = Section("Certainty", "probabilities")
    whole = [(network.name, network.table, network.settings["sigma"]) for network in run.networks if network.table is not None]
    if not whole:
        said.missing = "No certificates image by image are in the folder, so the distribution of p_A is not shown."
        return said
    said.charts = [figures.probabilities(whole)]
    settings = next(network.settings for network in reversed(run.networks) if network.table is not None)
    reach = settings["alpha"] ** (1 / settings["n"])
    wrong = ", ".join(f"{name} {int((~table.correct).sum())}" for name, table, _ in whole)
    said.caption = (
        "Test images by the lower bound on p_A, the probability of the right class under noise: Phi(radius / sigma), at most "
        f"{reach:.4f} with n = {settings['n']:,}. Wrong or abstained: {wrong}."
    )
    return said


def _changed(run: Run, datasets: Datasets) -> Section:
    said, own = Section("Images whose certificate changed most", wide=True), run.own
    alike = [network for network in run.networks if own is not None and network.settings == own.settings]
    tables = {network.name: network.table for network in alike if network.table is not None}
    if own is None or own.table is None or len(tables) < 2:
        said.missing = (
            "No two networks with certificates image by image, on the same images, are in the folder: no changes to show."
        )
        return said
    before = next(iter(tables))  # FP32 where it is there
    try:
        images, labels, names = _test_images(run, own, datasets)
    except ArqError as error:
        said.missing = f"The images whose certificate changed most are not shown: {error}."
        return said
    change = own.table.certified_radius - tables[before].certified_radius
    order = [row for row in np.argsort(-np.abs(change), kind="stable")[:PICTURES] if change[row]]
    lost, gained = int((change < 0).sum()), int((change > 0).sum())
    said.caption = (
        f"From {before} to {own.name} the certified radius (0 where the answer is wrong or none) shrinks for {lost} images, "
        f"grows for {gained}, and stays for {len(change) - lost - gained}. The largest changes first:"
    )
    every, offset = own.images
    for row in order:
        answers = [(name, _answer(table, row, names)) for name, table in tables.items()]
        said.pictures.append(
            {
                "picture": _png(images[row]),
                "name": names[labels[row]],
                "more": f"test image {offset + every * row}",
                "value": f"{change[row]:+.3f}",
                "answers": answers,
            }
        )
    return said


def _test_images(run: Run, network: Certified, datasets: Datasets) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """The test images that a network was certified on: uint8 [n, h, w, c], labels [n], and the names of the classes.

    :raises ArqError: when they cannot be had, or are not those
    """
    if "dataset" not in run.header:
        raise ArqError("the folder does not name its data set")
    dataset, (every, offset) = datasets(run.header["dataset"]), network.images
    images, labels = dataset.test.images[offset::every], dataset.test.labels[offset::every]
    if sha256(np.ascontiguousarray(to_float(as_tensor(images)))) != network.settings["images"]:
        raise ArqError(f"the test images of {run.header['dataset']} that are here are not those that were certified")
    return images, labels, dataset.classes


def _answer(table: Certificates, row: int, names: Sequence[str]) -> str:
    prediction, radius = int(table.prediction[row]), float(table.radius[row])
    return "abstains" if prediction < 0 else f"{names[prediction]}, {radius:.3f}"


def _png(image: np.ndarray) -> str:
    """An image as a data URI."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _layers(run: Run) -> Section:
    """The map as a table, for who does not hover."""
    if not run.layers:
        return Section("Layers", missing="No bit_widths.json is in the folder, so there are no layers to list.")
    costs = [layer["macs"] * layer["weight_bits"] * layer["activation_bits"] for layer in run.layers]
    rows = [
        (
            layer["name"],
            f"{layer['weight_bits']}",
            f"{layer['activation_bits']}",
            f"{layer['macs']:,}",
            f"{layer['parameters']:,}",
            f"{cost / sum(costs):.2%}",
        )
        for layer, cost in zip(run.layers, costs, strict=True)
    ]
    head = ("layer", "weight bits", "activation bits", "multiply-accumulates", "weights", "share of BOPs")
    return Section("Layers", head=head, rows=rows, wide=True, folded=True)
