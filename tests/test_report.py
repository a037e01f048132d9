"""The report of run folders: what is read, what is said to be missing, and the page in a browser."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from arq_agents.search import search
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.comparison import TestSettings, compare_maps
from arq_env.datasets import load_if_here
from arq_env.report import compared, figures, single
from arq_env.report.page import write_report
from arq_env.report.run import FINAL, read_run
from arq_env.report.tables import verdict
from arq_env.support.files import write_json
from tests.end_to_end.scripts import ROOT
from tests.toy import make_toy_env, toy_dataset

RESULTS = ROOT / "experiments" / "results"
FINALS = RESULTS / "finals"


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A run folder of a search on the toy problem, certified as the training scripts do it."""
    folder, env = tmp_path_factory.mktemp("runs") / "random", make_toy_env()
    best = search("random", env, episodes=6, folder=folder, progress=False)
    maps = {"W2A2": uniform(env.layers, 2, 2), "found": best.bit_widths}
    comparison = compare_maps(env.evaluator, maps, TestSettings(every=1, n0=8, n=64), folder=folder / "certificates")
    write_json(folder / "certificates.json", comparison.document(env.evaluator))
    return folder


@pytest.fixture
def folder(searched, tmp_path):
    """A copy of it to change."""
    return shutil.copytree(searched, tmp_path / "run")


def toy(name):
    assert name == "toy"
    return toy_dataset()


def read(folder):
    return read_run(folder, read_trace(folder / "trace.jsonl"))


def titled(sections, title):
    (section,) = (section for section in sections if section.title == title)
    return section


def test_all_of_a_run_is_read(searched):
    run = read(searched)
    assert [network.name for network in run.networks] == ["FP32", "W2A2", "found"] and not run.notes
    assert (run.own.name, run.base.name, len(run.layers), len(run.episodes)) == ("found", "W2A2", 4, 6)
    assert run.header | {"budget": 0} == {"network": "toy", "dataset": "toy", "sigma": 0.5, "budget": 0}
    stated = json.loads((searched / "certificates.json").read_text())
    for network in run.networks:
        assert network.table.acr == stated["networks"][network.name]["acr"]
        assert network.curve[0] == (0.0, stated["networks"][network.name]["clean_accuracy"])
        assert network.curve[-1][1] == 0 and network.curve[-2][0] == pytest.approx(0.5 * stats.norm.ppf(0.001 ** (1 / 64)))
    sections = single.sections(run, toy)
    assert not [section.title for section in sections if section.missing]
    difference = stated["acr_differences"]["found - W2A2"]
    cell = f"{difference['mean']:+.4f} ± {difference['standard_error']:.4f}"
    assert [row[-1] for row in titled(sections, "Networks").rows][2] == cell
    assert titled(sections, "In short").caption == verdict("found", "W2A2", difference["mean"], difference["standard_error"])


def test_the_images_that_changed_most(searched):
    """Their pictures are those of the data set, in the order of the change, with what each network says."""
    run = read(searched)
    found, fp32, dataset = run.networks[2].table, run.networks[0].table, toy_dataset()
    change = found.certified_radius - fp32.certified_radius
    pictures = titled(single.sections(run, toy), "Images whose certificate changed most").pictures
    assert 1 <= len(pictures) <= 12 and len(pictures) == min(12, np.count_nonzero(change))
    sizes = [abs(float(picture["value"])) for picture in pictures]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == pytest.approx(np.abs(change).max(), abs=5e-4)
    for picture in pictures:
        index = int(picture["more"].removeprefix("test image "))
        image = Image.open(io.BytesIO(base64.b64decode(picture["picture"].partition(",")[2])))
        assert (np.asarray(image) == dataset.test.images[index]).all() and picture["name"] == dataset.classes[found.label[index]]
        assert float(picture["value"]) == pytest.approx(change[index], abs=5e-4)
        said = dict(picture["answers"])
        assert list(said) == ["FP32", "W2A2", "found"]
        right = found.prediction[index]
        assert said["found"] == ("abstains" if right < 0 else f"{dataset.classes[right]}, {found.radius[index]:.3f}")


def test_pictures_of_other_images_are_not_shown(searched):
    def other(name):
        dataset = toy_dataset()
        dataset = type(dataset)(
            **{field: getattr(dataset, field) for field in ("name", "classes", "flip", "train", "reward", "test")}
        )
        object.__setattr__(dataset, "test", type(dataset.test)(dataset.test.images[::-1].copy(), dataset.test.labels))
        return dataset

    assert (
        "not those that were certified"
        in titled(single.sections(read(searched), other), "Images whose certificate changed most").missing
    )


@pytest.mark.parametrize(
    "budget, told, share",
    [
        (0.02, "budget 2.0000% of FP32's bit operations", True),
        ({"bops": 0.02, "bytes": 120_000}, "budget 2.0000% of FP32's bit operations and 120,000 bytes", True),
        ({"latency": {"milliseconds": 3.5, "table": "t.json", "sha256": "0"}}, "budget 3.5 ms", False),
    ],
)
def test_budgets_of_every_kind(folder, budget, told, share):
    document = json.loads((folder / "bit_widths.json").read_text()) | {"budget": budget}
    (folder / "bit_widths.json").write_text(json.dumps(document))
    run = read(folder)
    tiles = {tile["name"]: tile for tile in titled(single.sections(run, toy), "In short").tiles}
    assert told in single.title(run)[1]
    assert tiles["bit operations"].get("share") == (pytest.approx(document["bops_fraction"] / 0.02) if share else None)
    assert ("120,000" in told) == ("share" in tiles["size"])
    named = "The budget is not one" in titled(single.sections(run, toy), "Use of the budget").caption
    assert named != share


@pytest.mark.parametrize(
    "gone, said",
    [
        ("trace.jsonl", {"Search": "No trace.jsonl"}),
        ("bit_widths.json", {"Bits of each layer": "No bit_widths.json", "Layers": "No bit_widths.json"}),
        (
            "certificates.json",
            {"Networks": "No certificates", "Certified accuracy": "No certificates", "Certainty": "image by image"},
        ),
        ("certificates", {"Certainty": "image by image", "Images whose certificate changed most": "No two networks"}),
    ],
)
def test_what_is_not_there_is_said(folder, gone, said):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    sections = single.sections(read(folder), toy)
    missing = {section.title: section.missing for section in sections if section.missing}
    assert said.keys() <= missing.keys() and all(text in missing[title] for title, text in said.items())
    assert not any(section.charts or section.rows or section.pictures for section in sections if section.missing)
    if gone == "certificates":  # the sums are enough for a curve in steps
        assert "in steps of 0.25" in titled(sections, "Certified accuracy").caption
        assert titled(sections, "Networks").rows[2][-1].count("±") == 1


def test_charts_are_what_vega_draws(searched, folder):
    """Every chart of a run, of a folder of finalize.py, and of several, is compiled; drawing code warns of nothing."""
    vl_convert = pytest.importorskip("vl_convert")
    finals = [read_run(path) for path in sorted(FINALS.glob("cifar10-sigma0.5-consistency-*"))]
    runs = compared.named([read(searched), read(folder)])
    pages = [single.sections(read(searched), toy), compared.sections(finals), compared.sections(runs)]
    drawn = [chart for sections in pages for section in sections for chart in section.charts]
    assert len(drawn) == 8 + 1 + 3
    for chart in drawn:
        document = figures.themed(chart.properties(width="container"), figures.INK)
        assert vl_convert.vegalite_to_vega(document)["marks"]
    assert [run.name for run in runs] == ["random", "run"]


def test_finished_networks_are_compared():
    runs = compared.named([read_run(path) for path in sorted(FINALS.glob("cifar10-sigma0.5-consistency-*"))])
    assert [run.name for run in runs][:3] == ["FP32", "W2A2", "W3A3"]
    sections = compared.sections(runs)
    stated = json.loads((FINALS / "comparison.json").read_text())
    pair = next(p for p in stated["pairs"] if p["checkpoint"].endswith("sigma0.5-consistency") and p["maps"] == ["FP32", "W2A2"])
    row = dict(zip(titled(sections, "Runs").head, titled(sections, "Runs").rows[1], strict=True))
    assert row["ACR − FP32's, paired"] == f"{-pair['acr_difference']:+.4f} ± {pair['acr_difference_standard_error']:.4f}"
    points = titled(sections, "Pareto curve").charts[0].layer[2].data.values
    ratios = {
        r["map"]: r["against_fp32"]["finished_alike"]["acr_ratio"]
        for r in stated["rows"]
        if "sigma0.5" in r["checkpoint"] and "against_fp32" in r
    }
    drawn = {point["run"]: point["value"] for point in points}
    assert drawn["W4A4"] == pytest.approx(ratios["W4A4"]) and "FP32" not in drawn
    other = [*runs, read_run(next(FINALS.glob("cifar10-sigma1-consistency-W2A2")))]
    assert "Fewer than two" in titled(compared.sections(other), "Pareto curve").missing
    assert "other images, or with other noise" in titled(compared.sections(other), "Certified accuracy").missing


def test_searches_for_other_problems_are_not_compared(searched):
    runs = [read(searched), read(RESULTS / "signs-sigma0.5-td3")]
    assert "differ in network" in titled(compared.sections(runs), "Searches").missing


def test_a_final_folder_stands_beside_what_the_search_certified(folder):
    """On the same images it is paired; on others it is shown, and said not to be."""
    table = sorted((folder / "certificates").glob("found-*.tsv"))[0]
    (folder / "final").mkdir()
    stated = json.loads((folder / "certificates.json").read_text())
    summary = stated["networks"]["found"] | {
        "map": "run",
        "images": 40,
        "sigma": 0.5,
        "settings": stated["settings"],
        "network": "toy",
    }
    for n in (64, 640):
        settings = stated["settings"] | {"n": n}
        (folder / "final" / f"summary-n{n}.json").write_text(json.dumps(summary | {"settings": settings, "model_bytes": 1_234}))
        shutil.copy(table, folder / "final" / f"certificates-n{n}.tsv")
        beside = json.loads((table.parent / (table.name + ".settings.json")).read_text()) | {"n": n}
        (folder / "final" / f"certificates-n{n}.tsv.settings.json").write_text(json.dumps(beside))
    run = read(folder)
    assert [network.name for network in run.networks] == ["FP32", "W2A2", "found", FINAL] and run.own.settings["n"] == 64
    assert "2 certificates" in run.notes[0]
    (folder / "final" / "summary-n64.json").unlink()
    networks = titled(single.sections(read(folder), toy), "Networks")
    assert dict(zip(networks.head, networks.rows[-1], strict=True))["ACR − W2A2, paired"] == "not paired"
    assert "1,234" in networks.rows[-1]


def test_verdicts():
    assert verdict("found", "W4A4", 0.01, 0.004).startswith(
        "The found map wins against W4A4 by more than two standard errors (+0.0100"
    )
    assert "is not told apart from W4A4" in verdict("found", "W4A4", 0.01, 0.006)
    assert "loses to W4A4" in verdict("finished", "W4A4", -0.01, 0.004) and "not told apart" in verdict(
        "found", "W4A4", 0, float("inf")
    )


def test_the_pareto_curve_leaves_out_what_is_dominated():
    points = [(0.01, 0.9), (0.02, 0.8), (0.005, 0.5), (0.03, 0.95), (0.01, 0.85), (0.04, 0.95)]
    rows = [{"BOPs of FP32": cost, "value": value} for cost, value in points]
    assert [(row["BOPs of FP32"], row["value"]) for row in figures.front(rows)] == [(0.005, 0.5), (0.01, 0.9), (0.03, 0.95)]


def test_times_of_recalled_maps_are_not_counted_twice(searched):
    episodes = read(searched).episodes
    values = figures.seconds([*episodes, episodes[-1]]).data.values
    new = [values[i]["minutes"] for i in (-3, -1)]
    assert new[0] == new[1] == pytest.approx(sum(e.evaluation_seconds for e in episodes) / 60)


BROKEN = ["", "[]", "{", '{"format": "arq-bit-widths", "layers": [{}]}', '{"settings": {}}']


@pytest.mark.parametrize(
    "name, text",
    [("config.json", text) for text in BROKEN[:3]]
    + [(name, text) for name in ("bit_widths.json", "certificates.json") for text in BROKEN],
)
def test_damaged_files_are_one_line(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(ArqError, match=name):
        read(folder)


def test_a_report_downloads_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("ARQ_DATA", str(tmp_path))
    with pytest.raises(ArqError, match="not on this machine"):
        load_if_here("cifar10")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, driven by Selenium."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("there is no chromium with chromedriver here")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    alone = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic"
    for flag in ("headless", "no-sandbox", "disable-gpu", *alone.split(), f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_the_page_in_a_browser(folder, searched, browser, several):
    """Whole at a desk's and a phone's width, light and dark; every chart drawn, nothing fetched, nothing to complain of."""
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.wait import WebDriverWait

    document = json.loads((folder / "bit_widths.json").read_text())
    document["layers"][1]["name"] = "</script><b>middle's"
    (folder / "bit_widths.json").write_text(json.dumps(document))
    runs = [read(folder), read(searched)] if several else [read(folder)]
    page = write_report(runs, folder / "report", toy)
    charts = 3 if several else 8
    pictures = {path.name for path in page.parent.glob("*.png")}
    assert (
        {"pareto.png", "searches.png"} <= pictures if several else {"bits.png", "reward.png", "certified_accuracy.png"} <= pictures
    )
    for path in page.parent.glob("*.png"):
        assert len(np.unique(np.asarray(Image.open(path)).reshape(-1, 4), axis=0)) > 5, path
    inks = set()
    for width in (1280, 400):
        for scheme in ("light", "dark"):
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get(page.as_uri())
            drawn = WebDriverWait(browser, 60).until(lambda window: window.execute_script("return document.body.dataset.charts"))
            assert int(drawn) == charts == len(browser.find_elements(By.CSS_SELECTOR, ".chart svg"))
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            inside = "return [...document.querySelectorAll('.chart svg')].every(s => s.getBoundingClientRect().right <= innerWidth)"
            assert browser.execute_script(inside)
            assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
            style = "return getComputedStyle(document.querySelector('{}')).{}"
            ink = browser.execute_script(style.format(".chart svg text", "fill"))
            ground = browser.execute_script(style.format("body", "backgroundColor"))
            assert ink != ground
            inks.add((scheme, ink, ground))
    assert len(inks) == 2 and len({ink for _, ink, _ in inks}) == 2
    assert browser.get_log("browser") == [] and not browser.find_elements(By.CSS_SELECTOR, "b")
    if not several:
        bar = browser.find_elements(By.CSS_SELECTOR, ".chart svg .mark-rect path")[2]
        ActionChains(browser).scroll_to_element(bar).move_to_element(bar).perform()
        told = WebDriverWait(browser, 10).until(
            lambda window: window.find_element(By.CSS_SELECTOR, "#vg-tooltip-element.visible").text
        )
        layer = next(layer for layer in document["layers"] if layer["name"] in told)
        for text in (f"weight bits\n{layer['weight_bits']}", f"activation bits\n{layer['activation_bits']}", "share of BOPs"):
            assert text in told.replace(" bits ", " bits\n"), told
        edge = browser.execute_script("return document.getElementById('vg-tooltip-element').getBoundingClientRect().toJSON()")
        assert 0 <= edge["left"] < edge["right"] <= width
