"""The searching scripts as a user runs them."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.end_to_end.scripts import ROOT, assert_one_line_error, kill, lines, script
from tests.own import arguments_of

#: Evaluations of a tenth of the images.
FEW = ["--images", "200", "--calibration-images", "64"]
SHORT = ["--env", "ARQ-ResNet20-Signs-v0", *FEW, "--episodes", "22", "--test-images", "10", "--test-n", "50"]


def small():
    """A network that takes a hundredth of a ResNet-20's time, as options."""
    given = arguments_of("ARQ-Custom-v0")
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]


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

    kill("train_td3", *SHORT, "--output", cut, when=lambda: len(lines(cut / "trace.jsonl")) >= 5)
    assert script("train_td3", *SHORT, "--output", cut).returncode == 0
    rewards = [[json.loads(line)["reward"] for line in lines(run / "trace.jsonl")] for run in (whole, cut)]
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
def test_from_search_to_report_in_one_command(tmp_path):
    pytest.importorskip("vl_convert")
    pytest.importorskip("onnx")
    done = script("train_td3", *SHORT, "--budget", "0.007", "--finish", "2", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    rows = [line.split()[0] for line in done.stdout.splitlines() if "+-" in line]
    assert (rows[0], rows[2:]) == ("FP32", ["found", "finished"]) and rows[1].startswith("W")
    *_, sentence, packed, onnx, report = done.stdout.splitlines()
    assert packed == f"packed: {tmp_path / 'run' / 'finished' / 'network.arq.safetensors'}"
    assert onnx == f"onnx: {tmp_path / 'run' / 'finished' / 'network.onnx'}"
    assert sentence.startswith("The found map ") and "two standard errors" in sentence
    assert report == f"report: {tmp_path / 'run' / 'report' / 'report.html'}" and (tmp_path / "run/report/report.html").exists()
    networks = json.loads((tmp_path / "run" / "certificates.json").read_text())["networks"]
    assert list(networks) == rows and networks[rows[1]]["bops_fraction"] <= 0.007 >= networks["found"]["bops_fraction"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_ddpg", "train_sac", "solve_integer_program"])
def test_other_searches_run(tmp_path, name):
    done = script(name, *small(), "--episodes", "3", "--test-images", "0", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert 1 <= len(lines(tmp_path / "trace.jsonl")) <= 3  # an integer program may have one optimum


@pytest.mark.slow
def test_an_agent_with_levers(tmp_path):
    added = shlex.split("--add features demonstrations --regained-bits 1")
    done = script("train_sac", *small(), "--episodes", "4", "--test-images", "0", *added, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["algorithm"] == "sac+features+demonstrations"
    assert len(lines(tmp_path / "trace.jsonl")) == 4


def test_comparing_mistakes(called, tmp_path):
    assert_one_line_error(called("solve_integer_program", "--add", "onehot", "--output", tmp_path), "onehot cannot be added")
    assert_one_line_error(called("train_td3", "--add", "luck", "--output", tmp_path), "luck", "exchange")
    assert_one_line_error(called("compare_searches", "--methods", "magic", "--output", tmp_path), "magic", "integer_program")
    assert_one_line_error(called("compare_searches", "--methods", "uniform", "--budget", "2", "--output", tmp_path), "fraction")
    signs = ["--env", "ARQ-ResNet20-Signs-v0", "--training", "gaussian"]
    dear = called("compare_searches", *signs, "--methods", "greedy", "--episodes", "4", "--output", tmp_path)
    assert_one_line_error(dear, "greedy measures", "--episodes more")
    assert_one_line_error(
        called("train_any_budget", "--low", "0", "--output", tmp_path / "x"), "budgets from 0.0 to 0.03", "low first"
    )
    assert_one_line_error(called("apply_agent", tmp_path), "holds no agent for all budgets")
    (tmp_path / "config.json").write_text(
        '{"algorithm": "td3", "budgets": [0.01, 0.02], "env": "ARQ-ResNet20-Signs-v0", "sigma": 0.5}'
    )
    assert_one_line_error(called("apply_agent", tmp_path), "training the agent learned on", "give --training")
    given = ["--training", "gaussian", "--regained-bits", "0"]
    assert_one_line_error(called("apply_agent", tmp_path, *given), "holds no agent that can be read")
    assert_one_line_error(called("apply_agent", tmp_path, *given, "--sigma", "7"), "resnet20-signs-sigma0.5-gaussian")
    (tmp_path / "config.json").unlink()
    assert_one_line_error(called("pareto", "--maps", "mine"), "mine names no map")
    assert_one_line_error(called("pareto", "--maps", "mine", "W9A4"), "9", "2 to 8")
    assert_one_line_error(called("pareto", "--maps", "mine", tmp_path / "none.json"), "none.json cannot be read")
    assert_one_line_error(called("train_any_budget", "--low", "0.03", "--high", "0.02", "--output", tmp_path / "x"), "low first")
    assert_one_line_error(called("train_any_budget", "--budgets", "0.2", "--output", tmp_path / "x"), "0.2 is not")


@pytest.mark.slow
def test_searches_are_compared_and_resumed(tmp_path):
    """Two searches in two processes, their maps finished; the same command again evaluates nothing and says the same."""
    command = shlex.split("compare_searches --env ARQ-ResNet20-Signs-v0 --training gaussian --methods uniform random --seeds 2")
    command += [*FEW, "--episodes", "2", "--processes", "2", "--output", tmp_path, *shlex.split("--steps 2 --every 100 --n 20")]
    done = script(*command)
    assert done.returncode == 0, done.stderr
    assert "| uniform | 0 |" in done.stdout and "| random | 0 |" in done.stdout
    document = json.loads((tmp_path / "comparison-budget0.007.json").read_text())
    assert document["methods"]["random"]["proposed_maps"] == [2, 2]
    assert -1 <= document["spearman_of_exported_reward_and_finished_ratio"] <= 1
    mean, runs = document["methods"]["random"]["mean"], document["methods"]["random"]["best_reward"]
    assert mean[-1] == pytest.approx(np.mean(runs)) and mean == sorted(mean)
    finished = {name: found["finished_ratio"] for name, found in document["methods"].items()}
    assert document["methods"]["random"]["finished"]["mean"] == pytest.approx(np.mean(finished["random"]) - 1)
    against = document["methods"]["uniform"]["finished_against"]["random"]
    assert against["mean"] == pytest.approx(finished["uniform"][0] - np.mean(finished["random"])) and against["standard_error"] > 0
    assert (tmp_path / "comparison-budget0.007.png").exists()
    assert {path.name for path in (tmp_path / "budget0.007").iterdir()} == {"uniform-seed0", "random-seed0", "random-seed1"}
    assert script(*command).stdout == done.stdout
    quick = script(*command, "--rewards-only", "--name", "quick")
    assert quick.returncode == 0 and quick.stdout.count("|  |  |") == 2, quick.stderr
    rewards = json.loads((tmp_path / "quick-budget0.007.json").read_text())["methods"]["random"]
    assert rewards["mean"] == mean and "finished" not in rewards

    files = [str(tmp_path / "budget0.007" / f"random-seed{seed}" / "bit_widths.json") for seed in (0, 1)]
    alike = shlex.split("--env ARQ-ResNet20-Signs-v0 --training gaussian --steps 2 --every 100 --n 20")
    output = tmp_path / "pareto.json"
    even = str(tmp_path / "budget0.007" / "uniform-seed0" / "bit_widths.json")
    named = ["--maps", "random", *files, "--maps", "uniform", "W2A2", "W3A3", even]
    curve = script("pareto", *named, *alike, "--store", tmp_path, "--output", output)
    assert curve.returncode == 0 and curve.stdout.count("| random |") == 2, curve.stderr
    pairs = json.loads(output.read_text())["pairs"]
    curves = json.loads(output.read_text())["curves"]
    assert [row["map"] for row in curves["uniform"]] == ["W2A2", even, "W3A3"]
    rows = curves["random"]
    assert sorted(row["ratio"] for row in rows) == pytest.approx(sorted(finished["random"])) and output.with_suffix(".png").exists()
    cost = {row["map"]: (row["bops_fraction"], row["ratio"]) for curve in curves.values() for row in curve}
    near = {(a, even): cost[a][1] - cost[even][1] for a in files if cost[a][0] <= 1.1 * cost[even][0]}  # 2 and 3 bits are not
    assert {(pair["maps"][1], pair["against"][1]): pair["difference"] for pair in pairs} == pytest.approx(near) and near
    exported = (json.loads(path.read_text())["layers"] for path in tmp_path.glob("budget0.007/*/bit_widths.json"))
    distinct = {json.dumps(layers) for layers in exported}
    assert len(list((tmp_path / "finished").iterdir())) == len(distinct) + 1 + 2  # beside FP32 only the two uniform maps were new


@pytest.mark.slow
def test_one_agent_exports_a_map_for_each_budget(tmp_path):
    command = shlex.split("train_any_budget --env ARQ-ResNet20-Signs-v0 --training gaussian --episodes 2 --low 0.01 --high 0.015")
    done = script(*command, *FEW, "--budgets", "0.01", "0.015", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert [row["budget"] for row in rows] == [0.01, 0.015] and all(row["bops_fraction"] <= row["budget"] for row in rows)
    again = script("apply_agent", tmp_path, "--budgets", "0.01", "0.012")  # on what it learned on
    assert again.returncode == 0, again.stderr
    there = json.loads((tmp_path / "applied-ARQ-ResNet20-Signs-v0-sigma0.5-gaussian" / "budgets.json").read_text())["rows"]
    assert there[0] == rows[0] and 0 < there[1]["bops_fraction"] <= 0.012
    one = json.loads((tmp_path / "maps" / "0.015" / "bit_widths.json").read_text())
    assert one["budget"] == 0.015 and one["bops_fraction"] == rows[1]["bops_fraction"]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ddpg", "td3", "sac"])
def test_rl_zoo3_trains_with_our_hyperparameters_and_shows_the_agent(tmp_path, algorithm):
    command = shlex.split(f"-m rl_zoo3.train --algo {algorithm} --env ARQ-ResNet20-Signs-v0 --gym-packages arq_env")
    command += ["--conf-file", f"arq_agents.zoo.{algorithm}", "-n", "36", "--eval-freq", "-1", "--log-folder", tmp_path]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monitor = lines(tmp_path / algorithm / "ARQ-ResNet20-Signs-v0_1" / "0.monitor.csv")
    assert len(monitor) == 2 + 2 and all(line.split(",")[1] == "18" for line in monitor[2:])
    command = shlex.split(f"-m rl_zoo3.enjoy --algo {algorithm} --env ARQ-ResNet20-Signs-v0 --gym-packages arq_env -n 18")
    shown = subprocess.run([sys.executable, *command, "-f", tmp_path, "--no-render"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "Episode Length 18" in shown.stdout, shown.stderr
