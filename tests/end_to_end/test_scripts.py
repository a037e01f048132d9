"""The scripts as a user runs them: what they print, leave behind, and exit with."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arq_env import ArqError
from arq_env.certification import Certificates
from arq_env.quantization import load_quantized
from arq_env.quantization.integer import integer_kernels

ROOT = Path(__file__).parents[2]


def script(name, *arguments, **environment):
    command = [sys.executable, f"experiments/{name}.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment)


def assert_one_line_error(done, *parts):
    """Exit code 2, and a single line that says what to do."""
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "experiments").glob("*.py"))])
def test_help(name):
    done = script(name, "--help")
    assert done.returncode == 0 and "--output" in done.stdout


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--env", "ARQ-ResNet21-v0"], ["ARQ-ResNet21"]),
        (["--sigma", "-1"], ["sigma"]),
        (["--sigma", "7"], ["resnet20-signs-sigma0.5-gaussian"]),
        (["--training", "magic"], ["resnet20-cifar10-sigma0.5-consistency"]),
        (["--budget", "2"], ["fraction"]),
        (["--budget", "0.001"], ["least reachable is 0.004"]),
        (["--episodes", "0"], ["whole number from 1"]),
        (["--seed", "-1"], ["whole number from 0"]),
        (["--test-n", "0"], ["whole number from 1"]),
        (["--env", "CartPole-v1"], ["ARQ-ResNet20-v0"]),
        (["--budget", "much"], ["--budget"]),
        (["--device", "abacus"], ["cpu or cuda"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, parts):
    output = tmp_path / "run"
    defaults = ["--env", "ARQ-ResNet20-Signs-v0"] if "--env" not in arguments else []
    assert_one_line_error(script("train_td3", *defaults, *arguments, "--output", output), *parts)
    assert not output.exists()


def test_no_space_for_the_data(tmp_path):
    """A cache folder that cannot be made stands for a full disk: both are the same OSError to the code."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = script("train_td3", "--env", "ARQ-ResNet20-Signs-v0", "--output", tmp_path / "run", ARQ_DATA=str(blocked / "cache"))
    assert_one_line_error(done, "ARQ_DATA")


def test_malformed_map(tmp_path):
    (tmp_path / "bit_widths.json").write_text("{}")
    assert_one_line_error(script("certify_map", tmp_path), "bit-width map")
    assert_one_line_error(script("certify_map", tmp_path / "none.json"), "cannot be read")


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--sigma", "-1"], ["--device", "abacus"], ["--batch", "1000000"], ["--start", "resnet20-nothing"]],
)
def test_pretraining_mistakes(tmp_path, arguments):
    assert_one_line_error(script("pretrain", "--dataset", "signs", *arguments, "--output", tmp_path / "run"))


@pytest.mark.parametrize("wanted, part", [("nothing", "FP32 or W4A4"), ("W9A1", "weight bits 9"), ("W4A4", "sigma7")])
def test_finalizing_mistakes(tmp_path, wanted, part):
    sigma = "7" if part == "sigma7" else "0.5"
    done = script("finalize", wanted, "--dataset", "signs", "--sigma", sigma, "--output", tmp_path / "out")
    assert_one_line_error(done, part)
    assert not (tmp_path / "out").exists()


def test_agreement_of_rankings(tmp_path):
    """Perfect, reversed and none, and a table of finished maps that a kill cut short."""
    functions = runpy.run_path(str(ROOT / "experiments/rank_maps.py"))
    radii = np.linspace(0.1, 0.9, 12)[:, None] + np.random.default_rng(0).normal(0, 0.01, (12, 500))
    scores = {"same": radii.mean(1), "reversed": -radii.mean(1), "none": np.random.default_rng(1).permutation(12)}
    records = [{"radii_after": list(radii[i]), "in_loop": {name: s[i] for name, s in scores.items()}} for i in range(12)]
    found = functions["agreement"](records)
    assert found["correlation"]["same"] == pytest.approx(1) and found["correlation"]["reversed"] == pytest.approx(-1)
    assert abs(found["correlation"]["none"]) < 0.6 and found["reliability"] == pytest.approx(1)
    read, lines = functions["read"], tmp_path / "out" / "maps.jsonl"
    assert read(lines, {"sigma": 0.5}) == []
    with open(lines, "a") as file:
        file.write('{"index": 3}\n{"ind')
    assert read(lines, {"sigma": 0.5}) == [{"index": 3}] and lines.read_text().endswith("3}\n")
    with pytest.raises(ArqError, match="other settings"):
        read(lines, {"sigma": 1.0})


def test_unknown_checkpoint(tmp_path):
    done = script("certify_checkpoints", "resnet20-nothing", "--output", tmp_path / "out")
    assert_one_line_error(done, "resnet20-signs-sigma0.5-gaussian")
    assert not (tmp_path / "out").exists()


def test_finals_are_compared(tmp_path):
    """A made-up final: the shipped network's certificates, each radius shortened by a tenth."""
    references, name = ROOT / "experiments/results/references", "resnet20-signs-sigma0.5-gaussian"
    shipped = json.loads((references / f"{name}-n1000.json").read_text())
    table = Certificates.from_tsv(references / f"{name}-n1000.tsv")
    problem = {key: shipped[key] for key in ("dataset", "sigma", "training", "settings", "clean_accuracy", "certified_accuracy")}
    final = problem | {"network": "resnet20", "map": "made up", "bops_fraction": 0.01, "model_bytes": 77_777}
    final |= {"checkpoint": shipped["digest"], "acr": 0.9 * shipped["acr"]}
    final["recipe"] = {"epochs": 4}
    folders = {"FP32": tmp_path / "FP32", "made up": tmp_path / "map", "longer": tmp_path / "longer"}
    changes = {"FP32": {"bops_fraction": 1.0}, "made up": {}, "longer": {"recipe": {"epochs": 8}}}
    for name, factor in (("FP32", 1.2), ("made up", 0.9), ("longer", 0.96)):
        folders[name].mkdir()
        replace(table, radius=factor * table.radius).to_tsv(folders[name] / "certificates-n1000.tsv")
        document = final | {"map": name, "acr": factor * shipped["acr"]} | changes[name]
        (folders[name] / "summary-n1000.json").write_text(json.dumps(document))
    done = script("compare_finals", *folders.values(), "--output", tmp_path / "finals.json")
    assert done.returncode == 0, done.stderr
    rows = {row["map"]: row for row in json.loads((tmp_path / "finals.json").read_text())["rows"]}
    against = rows["made up"]["against_fp32"]
    assert against["shipped"]["acr_ratio"] == pytest.approx(0.9) and against["finished_alike"]["acr_ratio"] == pytest.approx(0.75)
    assert against["shipped"]["acr_difference"] == pytest.approx(-0.1 * shipped["acr"])
    assert against["shipped"]["acr_difference_standard_error"] == pytest.approx(0.1 * shipped["acr_standard_error"])
    assert against["shipped"]["acr_ratio_standard_error"] < 1e-6  # all radii shrink alike
    assert "finished_alike" not in rows["longer"]["against_fp32"]  # another recipe than the FP32 network's
    assert list(rows) == ["FP32 as shipped", "FP32", "made up", "longer"]
    for text in ("FP32 as shipped", "made up", "1.000%", "77,777", "0.900 +- 0.000", "0.750 +- 0.000"):
        assert text in done.stdout
    tmp_path = folders["made up"]
    (tmp_path / "summary-n1000.json").write_text(json.dumps(final | {"checkpoint": "0" * 64}))
    assert_one_line_error(script("compare_finals", tmp_path, "--output", tmp_path / "finals.json"), "other weights")
    assert_one_line_error(script("compare_finals", tmp_path / "nothing"), "finalize.py")


SHORT = ["--env", "ARQ-ResNet20-Signs-v0", "--episodes", "22", "--test-images", "10", "--test-n", "50"]


@pytest.mark.slow
def test_main_job_killed_and_resumed(tmp_path):
    """Kill a search with SIGKILL, run it again, and compare with one that was left alone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = script("train_td3", *SHORT, "--output", whole)
    assert done.returncode == 0, done.stderr
    for text in ("stage3.2.conv2", "share of BOPs", "FP32", "W4A4", "found", "paired"):
        assert text in done.stdout
    assert {path.name for path in whole.iterdir()} >= {
        "bit_widths.json",
        "agent.zip",
        "trace.jsonl",
        "tensorboard",
        "config.json",
        "certificates.json",
    }
    document = json.loads((whole / "certificates.json").read_text())
    assert document["networks"]["found"]["bops_fraction"] <= 1 / 64 < document["networks"]["W4A4"]["bops_fraction"]

    command = [sys.executable, "experiments/train_td3.py", *SHORT, "--output", str(cut)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    trace = cut / "trace.jsonl"
    while not (trace.exists() and len(trace.read_text().splitlines()) >= 5):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert script("train_td3", *SHORT, "--output", cut).returncode == 0
    rewards = [[json.loads(line)["reward"] for line in (run / "trace.jsonl").read_text().splitlines()] for run in (whole, cut)]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 22

    # the found map goes through the certifying script, and so does one edited by hand
    document = json.loads((whole / "bit_widths.json").read_text())
    document["layers"][5]["weight_bits"] = 8
    (tmp_path / "edited.json").write_text(json.dumps(document))
    output = tmp_path / "result.json"
    done = script("certify_map", tmp_path / "edited.json", "--every", "200", "--n", "30", "--n0", "10", "--output", output)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["maps"]["found"][document["layers"][5]["name"]][0] == 8 and result["images"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpg", "sac"])
def test_other_agents_run(tmp_path, algorithm):
    done = script(f"train_{algorithm}", *SHORT[:2], "--episodes", "3", "--test-images", "0", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 3


def test_comparing_mistakes(tmp_path):
    assert_one_line_error(script("compare", "--methods", "magic", "--output", tmp_path), "magic", "integer_program")
    assert_one_line_error(script("compare", "--methods", "uniform", "--budget", "2", "--output", tmp_path), "fraction")
    assert_one_line_error(script("train_any_budget", "--low", "0.03", "--high", "0.02", "--output", tmp_path / "x"), "low first")
    assert_one_line_error(script("train_any_budget", "--budgets", "0.2", "--output", tmp_path / "x"), "0.2 is not")


@pytest.mark.slow
def test_searches_are_compared_and_resumed(tmp_path):
    """Two searches in two processes; the same command again evaluates nothing and says the same."""
    command = [
        "compare",
        "--env",
        "ARQ-ResNet20-Signs-v0",
        "--training",
        "gaussian",
        "--methods",
        "uniform",
        "random",
        "--seeds",
        "2",
    ]
    command += ["--episodes", "2", "--processes", "2", "--output", tmp_path]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert "| uniform | 0 |" in done.stdout and "| random | 0 |" in done.stdout
    document = json.loads((tmp_path / "comparison-budget0.007.json").read_text())
    assert document["methods"]["random"]["proposed_maps"] == [2, 2]
    mean, runs = document["methods"]["random"]["mean"], document["methods"]["random"]["best_reward"]
    assert mean[-1] == pytest.approx(np.mean(runs)) and mean == sorted(mean)
    assert (tmp_path / "comparison-budget0.007.png").exists()
    assert {path.name for path in (tmp_path / "budget0.007").iterdir()} == {"uniform-seed0", "random-seed0", "random-seed1"}
    assert script(*command).stdout == done.stdout


@pytest.mark.slow
def test_one_agent_exports_a_map_for_each_budget(tmp_path):
    command = [
        "train_any_budget",
        "--env",
        "ARQ-ResNet20-Signs-v0",
        "--training",
        "gaussian",
        "--episodes",
        "2",
        "--output",
        tmp_path,
    ]
    done = script(*command, "--low", "0.01", "--high", "0.015", "--budgets", "0.01", "0.015")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert [row["budget"] for row in rows] == [0.01, 0.015] and all(row["bops_fraction"] <= row["budget"] for row in rows)
    one = json.loads((tmp_path / "maps" / "0.015" / "bit_widths.json").read_text())
    assert one["budget"] == 0.015 and one["bops_fraction"] == rows[1]["bops_fraction"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpg", "td3", "sac"])
def test_rl_zoo3_trains_with_our_hyperparameters(tmp_path, algorithm):
    command = [
        sys.executable,
        "-m",
        "rl_zoo3.train",
        "--algo",
        algorithm,
        "--env",
        "ARQ-ResNet20-Signs-v0",
        "--gym-packages",
        "arq_env",
    ]
    command += ["--conf-file", f"agents.zoo.{algorithm}", "-n", "36", "--eval-freq", "-1", "--log-folder", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monitor = (tmp_path / algorithm / "ARQ-ResNet20-Signs-v0_1" / "0.monitor.csv").read_text().splitlines()
    assert len(monitor) == 2 + 2 and all(line.split(",")[1] == "18" for line in monitor[2:])


@pytest.mark.slow
def test_pretraining_resumes_after_a_kill(tmp_path):
    """One epoch, a kill in the second, and on: the card tells the whole recipe."""
    arguments = ["--dataset", "signs", "--epochs", "2", "--batch", "256", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "experiments/pretrain.py", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = tmp_path / "resnet20-signs-sigma0.5-gaussian" / "training.pt"
    while not state.exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
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
    assert script("finalize", tmp_path / "edited.json", *short, "--output", tmp_path / "second").returncode == 0
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
    assert again.returncode == 2 and "another recipe" in again.stderr.splitlines()[-1]


@pytest.mark.slow
def test_checkpoints_are_certified_killed_and_resumed(tmp_path):
    name, arguments = "resnet20-signs-sigma0.5-gaussian", ["--every", "60", "--n0", "10", "--n", "600"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = script("certify_checkpoints", name, *arguments, "--output", whole)
    assert done.returncode == 0 and "| signs | 0.5 | gaussian | 600 |" in done.stdout, done
    command = [sys.executable, "experiments/certify_checkpoints.py", name, *arguments, "--output", str(cut)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = cut / f"{name}-n600.tsv"
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert script("certify_checkpoints", name, *arguments, "--output", cut).returncode == 0
    whole, cut = (json.loads((folder / f"{name}-n600.json").read_text()) for folder in (whole, cut))
    assert cut["acr"] == whole["acr"] > 0 and cut["images"] == 34 and cut["digest"] == whole["digest"]
