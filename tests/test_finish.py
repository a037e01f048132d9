"""``--finish``: from a search to four rows, a sentence and a report; once made, never made again."""

import json
import sys
from argparse import Namespace

import numpy as np
import pytest

from arq_agents import main as command
from arq_agents.search import search
from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.comparison import paired_difference
from arq_env.finishing import finished_network
from arq_env.quantization import load_quantized
from arq_env.report.run import read_run
from arq_env.report.tables import verdict
from tests.end_to_end.scripts import assert_one_line_error, script
from tests.toy import make_toy_env, toy_network


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_env", lambda options: make_toy_env())
    asked = {"algorithm": "random", "env": "ARQ-Toy-v0", "budget": 0.03, "sigma": 0.5, "training": "gaussian", "seed": 0}
    return Namespace(**asked, episodes=4, output=tmp_path / "run", test_images=20, test_n=100, finish=3, engine="serial")


def test_from_a_search_to_a_finished_network(options, capsys, monkeypatch):
    monkeypatch.setattr(command, "write_report", lambda runs, folder, datasets: folder / "report.html")  # has tests of its own
    command.main(options)
    said, folder = capsys.readouterr().out, options.output
    rows = [line.split() for line in said.splitlines() if line.startswith(("FP32 ", "W", "found ", "finished "))]
    chosen = rows[1][0]
    assert [row[0] for row in rows] == ["FP32", chosen, "found", "finished"] and rows[0][-1] != rows[1][-1]
    judged = [json.loads(line) for line in (folder / "uniform" / "trace.jsonl").read_text().splitlines()]
    env = make_toy_env()
    assert len(judged) > 1 and all(one["bops_fraction"] <= 0.03 for one in judged)
    exported = json.loads((folder / "uniform" / "bit_widths.json").read_text())
    bits = {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in exported["layers"]}
    assert bits == uniform(env.layers, int(chosen[1]), int(chosen[3]))

    document = json.loads((folder / "certificates.json").read_text())
    assert document["maps"]["finished"] == document["maps"]["found"] and document["images"] == 20
    sizes = {name: figures["model_bytes"] for name, figures in document["networks"].items()}
    assert sizes["FP32"] > sizes["found"] == sizes["finished"] > 0 and f"{sizes['found']:,}" in said
    tables = {network.name: network for network in read_run(folder).networks}
    assert list(tables) == ["FP32", chosen, "found", "finished"] and all(network.table for network in tables.values())
    assert verdict("found", chosen, *paired_difference(tables["found"].table, tables[chosen].table)) in said.splitlines()
    assert said.splitlines()[-1] == f"report: {folder / 'report' / 'report.html'}"
    for place in ("finished", "found"):
        stated = document["acr_differences"][f"{place} - {chosen}"]
        assert (stated["mean"], stated["standard_error"]) == paired_difference(tables[place].table, tables[chosen].table)

    monkeypatch.setattr("arq_env.finishing.finish_briefly", lambda *_: pytest.fail("it is there already"))
    monkeypatch.setattr(command, "search", _search_that_ended)
    command.main(options)
    assert capsys.readouterr().out == said
    network, card = load_quantized(folder / "finished" / "network.safetensors", toy_network())
    assert card["recipe"]["images"] > 0 and card["dataset"] == "toy"


def _search_that_ended(name, env, **given):
    """A search that finds everything done."""
    before = (given["folder"] / "trace.jsonl").read_bytes()
    best = search(name, env, **given)
    assert (given["folder"] / "trace.jsonl").read_bytes() == before
    return best


@pytest.mark.slow
def test_without_a_plotting_library_the_result_stands(options, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    command.main(options)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("no report: ") and 'pip install -e ".[report]"' in last
    assert (options.output / "certificates.json").exists()


def test_a_finished_network_is_of_one_map(tmp_path, toy_env):
    """The file is the network that was trained; another map, or more batches, are refused."""
    maps = [uniform(toy_env.layers, bits, bits) for bits in (2, 3)]
    first = finished_network(toy_env.evaluator, maps[0], tmp_path, 2)
    images, _ = toy_env.problem.test_images(every=4)
    again = finished_network(make_toy_env().evaluator, maps[0], tmp_path, 2)
    assert (first(images) == again(images)).all()
    assert not np.allclose(first(images).detach(), toy_env.evaluator.quantizer.quantize(maps[0])(images).detach())
    for bit_widths, steps in ((maps[1], 2), (maps[0], 3)):
        with pytest.raises(ArqError, match="another map, network or recipe"):
            finished_network(toy_env.evaluator, bit_widths, tmp_path, steps)


def test_finishing_needs_test_images(tmp_path):
    done = script("train_td3", "--finish", "--test-images", "0", "--output", tmp_path / "run")
    assert_one_line_error(done, "--finish certifies on test images")
    assert not (tmp_path / "run").exists()
