"""The scripts that train, finish and certify networks, as a user runs them."""

import json

import pytest

from arq_env.quantization import load_quantized
from arq_env.quantization.integer import integer_kernels
from tests.end_to_end.scripts import ROOT, kill, lines, script


@pytest.mark.slow
def test_pretraining_resumes_after_a_kill(tmp_path):
    """One epoch, a kill in the second, and on: the card tells the whole recipe."""
    arguments = ["--dataset", "signs", "--epochs", "2", "--batch", "256", "--output", str(tmp_path)]
    state = tmp_path / "resnet20-signs-sigma0.5-gaussian" / "training.pt"
    kill("pretrain", *arguments, when=state.exists)
    done = script("pretrain", *arguments)
    assert done.returncode == 0 and "epoch 2" in done.stdout + done.stderr and "epoch 1 " not in done.stdout, done
    card = json.loads(state.with_name("resnet20-signs-sigma0.5-gaussian.json").read_text())
    assert card["recipe"]["epochs"] == 2 and len(card["digest"]) == 64 and 0 < card["accuracy_under_noise"]["test"] < 1


@pytest.mark.slow
def test_a_map_is_finalized(tmp_path):
    """A uniform map, then the file it left, edited by hand; the same command again finds everything done."""
    short = ["--epochs", "1", "--images", "256", "--every", "200", "--n", "30"]
    first = tmp_path / "first"
    command = ("finalize", "W3A3", "--dataset", "signs", *short, "--output", first)
    done = script(*command)
    assert done.returncode == 0 and "W3A3: ACR" in done.stdout, done.stderr
    summary = json.loads((first / "summary-n30.json").read_text())
    assert summary["bops_fraction"] == pytest.approx(0.0094, rel=0.01) and summary["images"] == 10
    network, card = load_quantized(first / "network.safetensors")
    assert card["digest"] == summary["digest"] and network.stage1[0].conv1.weight_bits == 3
    assert script(*command).stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    if integer_kernels():
        assert script(*command, "--n", "31", "--integer").returncode == 0
        on_integers = json.loads((first / "summary-n31.json").read_text())
        assert on_integers["integer_kernels"] and on_integers["acr"] == pytest.approx(summary["acr"], abs=0.02)

    document = json.loads((first / "bit_widths.json").read_text())
    document["layers"][5]["weight_bits"] = 8
    (tmp_path / "edited.json").write_text(json.dumps(document))
    done = script("finalize", tmp_path / "edited.json", *short, "--output", tmp_path / "second")
    assert done.returncode == 0 and "more than its budget" in done.stderr
    assert json.loads((tmp_path / "second/bit_widths.json").read_text())["budget"] == document["budget"]
    done = script("finalize", tmp_path / "edited.json", *short, "--output", first)
    assert done.returncode == 2 and "differs in map" in done.stderr.splitlines()[-1]
    assert load_quantized(tmp_path / "second/network.safetensors")[1]["layers"][5]["weight_bits"] == 8


@pytest.mark.slow
def test_consistency_starts_from_a_checkpoint(tmp_path):
    arguments = ["--dataset", "signs", "--training", "consistency", "--epochs", "1", "--batch", "256", "--output", str(tmp_path)]
    assert script("pretrain", *arguments, "--start", "resnet20-signs-sigma0.5-gaussian").returncode == 0
    name = "resnet20-signs-sigma0.5-consistency"
    card = json.loads((tmp_path / name / f"{name}.json").read_text())
    assert (card["training"], card["recipe"]["noises"], card["recipe"]["consistency"]) == ("consistency", 2, 10.0)
    shipped = json.loads((ROOT / "arq_env/networks/weights/resnet20-signs-sigma0.5-gaussian.json").read_text())
    assert card["recipe"]["start"] == shipped["digest"]
    again = script("pretrain", *arguments, "--start", str(tmp_path / name / f"{name}.safetensors"))
    assert again.returncode == 2 and "differs in recipe" in again.stderr.splitlines()[-1]


@pytest.mark.slow
def test_checkpoints_are_certified_killed_and_resumed(tmp_path):
    name, arguments = "resnet20-signs-sigma0.5-gaussian", ["--every", "60", "--n0", "10", "--n", "600"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = script("certify_checkpoints", name, *arguments, "--output", whole)
    assert done.returncode == 0 and "| signs | 0.5 | gaussian | 600 |" in done.stdout, done
    kill("certify_checkpoints", name, *arguments, "--output", cut, when=lambda: len(lines(cut / f"{name}-n600.tsv")) > 1)
    assert script("certify_checkpoints", name, *arguments, "--output", cut).returncode == 0
    whole, cut = (json.loads((folder / f"{name}-n600.json").read_text()) for folder in (whole, cut))
    assert cut["acr"] == whole["acr"] > 0 and cut["images"] == 34 and cut["digest"] == whole["digest"]
