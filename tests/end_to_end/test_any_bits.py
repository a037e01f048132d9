"""Weights that stand any map, from their training to a network that is certified with none of its own."""

import json
import shutil

import pytest

from tests.end_to_end.scripts import assert_one_line_error, script

SIGNS = ["--env", "ARQ-ResNet20-Signs-v0"]
FEW = ["--images", "64", "--calibration-images", "64"]


@pytest.mark.slow
def test_from_one_training_to_a_map_that_needs_none(tmp_path):
    any_bits = [*SIGNS, "--training", "gaussian", *FEW, "--epochs", "1", "--epoch-images", "64", "--batch", "32", "--maps", "1"]
    done = script("train_any_bits", *any_bits, "--output", tmp_path / "any")
    assert done.returncode == 0 and "of FP32's ACR on reward images: W2A2" in done.stdout, done.stderr
    assert (
        script("train_any_bits", *any_bits, "--output", tmp_path / "any").stdout.splitlines()[-2:] == done.stdout.splitlines()[-2:]
    )
    assert_one_line_error(script("train_any_bits", *any_bits, "--low", "0.1", "--output", tmp_path / "x"), "low first")

    weights = tmp_path / "any" / "weights.safetensors"
    search = ["solve_integer_program", *SIGNS, *FEW, "--weights", weights, "--budget", "0.009", "--episodes", "2"]
    run = tmp_path / "run"
    done = script(*search, "--test-images", "0", "--output", run)
    assert done.returncode == 0, done.stderr
    made_with = json.loads((run / "bit_widths.json").read_text())["provenance"]
    assert made_with["weights"] == str(weights)
    done = script("certify_map", run, "--every", "400", "--n", "20")
    assert done.returncode == 0, done.stderr
    plain = script("solve_integer_program", *SIGNS, *FEW, "--budget", "0.009", "--episodes", "2", "--output", run)
    assert_one_line_error(plain, "differs in network")
    done = script("finalize", run, "--epochs", "1", "--images", "32", "--batch", "32", "--every", "400", "--n", "20")
    assert done.returncode == 0, done.stderr
    again = script(*search, "--regained-bits", "1", "--output", tmp_path / "y")
    assert_one_line_error(again, "leave regained_bits at 0")
    (run / "bit_widths.json").write_text((run / "bit_widths.json").read_text().replace(made_with["weights_digest"], "0" * 64))
    assert_one_line_error(script("certify_map", run, "--every", "400"), "found on other weights")
    shutil.move(weights, tmp_path / "moved")
    assert_one_line_error(script("certify_map", run, "--every", "400"), str(weights))
