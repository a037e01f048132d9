"""A grouped and depthwise network of one's own, from a folder of images and a module to certificates, by the scripts."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from arq_env.bitwidths import load_map
from arq_env.problem import load_mapped
from arq_env.quantization import load_quantized
from tests.end_to_end.scripts import ROOT, assert_one_line_error, lines, path_of
from tests.own import make_net, trained_state, write_images

MODULE = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, classes)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        return self.head(torch.relu(self.pointwise(x)).amax((2, 3)))


def make_net(classes=3):
    return Net(classes)
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script in a folder with a user's module and photos; returns what it left behind."""
    (tmp_path / "mymodels.py").write_text(MODULE)
    write_images(tmp_path / "photos", {"train": 200, "val": 30})

    def run(name, *arguments):
        command = [sys.executable, str(path_of(name)), *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}  # for networks of the tests
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)

    return run


@pytest.mark.slow
def test_from_a_module_and_a_folder_to_certificates(run, tmp_path, monkeypatch):
    own = ["--network", "mymodels:make_net", "--data", "photos", "--sigma", "0.25"]
    done = run("pretrain", *own, "--epochs", "8", "--batch", "30", "--peak-rate", "0.1", "--output", "trained")
    assert done.returncode == 0, done.stderr
    (weights,) = (tmp_path / "trained").glob("*/*.safetensors")
    assert weights.stem == "mymodels-make_net-photos-sigma0.25-gaussian"

    search = [*own, "--checkpoint", weights.relative_to(tmp_path), "--budget", "0.06", "--test-n", "50"]
    done = run("train_td3", *search, "--episodes", "3")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("td3-*")
    assert folder.name == "td3-ARQ-Custom-v0-make_net-photos-budget0.06-sigma0.25-seed0"
    assert "depthwise" in done.stdout and len(lines(folder / "trace.jsonl")) == 3
    said = json.loads((folder / "config.json").read_text())["provenance"]
    assert said["images"] == {"train": 540, "reward": 60, "test": 90} and said["problem"]["network"] == "mymodels:make_net"
    assert run("train_td3", *search, "--episodes", "4").returncode == 0 and len(lines(folder / "trace.jsonl")) == 4  # goes on

    done = run("finalize", folder, "--epochs", "2", "--batch", "30", "--every", "9", "--n", "50")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "final" / "summary-n50.json").read_text())
    assert summary["network"] == "mymodels:make_net" and summary["acr"] > 0.1 and summary["images"] == 10
    for map in (folder, folder / "final" / "bit_widths.json"):
        done = run("certify_map", map, "--every", "30", "--n", "50", "--n0", "10")
        assert done.returncode == 0 and "found" in done.stdout, done.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    problem, bit_widths, _, _ = load_mapped(folder)
    assert load_map(folder / "final" / "bit_widths.json", problem.layers)[0] == bit_widths
    quantized, _ = load_quantized(folder / "final" / "network.safetensors", problem.network)
    images, labels = problem.test_images(every=3)
    assert (quantized(images).argmax(1).numpy() == labels).mean() > 0.6

    brief = ["--epochs", "1", "--batch", "30", "--at-once", "10", "--every", "30", "--n", "20"]
    done = run("finalize", "W4A4", *own, "--checkpoint", weights, *brief, "--fix", "first=6/8")
    made = tmp_path / "runs/final/make_net-photos-fix-first-6-8-sigma0.25-gaussian-W4A4"
    assert done.returncode == 0, done.stderr
    fixed, bit_widths, _, _ = load_mapped(made)
    assert fixed.fix == {"first": "6/8"} and [*bit_widths.values()] == [(6, 8), *[(4, 4)] * (len(bit_widths) - 1)]
    assert_one_line_error(run("finalize", folder, "--fix", "first=6/8"), "--fix is for uniform bits")
    shutil.move("photos", "moved")
    assert_one_line_error(run("certify_map", folder), "is not here", "photos")


@pytest.mark.slow
def test_one_agent_for_every_budget_of_one_s_own_network(run, tmp_path):
    torch.save({"state_dict": trained_state()}, tmp_path / "net.pth")
    own = ["--network", "tests.own:make_net", "--data", "photos", "--sigma", "0.25", "--checkpoint", "net.pth"]
    more = ["--training", "gaussian", "--low", "0.04", "--high", "0.1", "--budgets", "0.05", "--output", "any"]
    done = run("train_any_budget", *own, *more, "--episodes", "3")
    assert done.returncode == 0, done.stderr
    done = run("apply_agent", "any", "--budgets", "0.06")
    assert done.returncode == 0 and "6.000%" in done.stdout, done.stderr
    compare = ["--training", "gaussian", "--methods", "uniform", "random", "--seeds", "1", "--episodes", "2", "--budget", "0.06"]
    done = run("compare_searches", *own, *compare, "--rewards-only", "--output", "compared")
    assert done.returncode == 0 and "| random |" in done.stdout, done.stderr


def test_mistakes_are_one_line(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mymodels.py").write_text(MODULE)
    write_images(tmp_path / "photos", {"train": 10, "val": 2})
    torch.save(make_net().state_dict(), "net.pth")
    own = ["--network", "mymodels:make_net", "--data", "photos", "--output", "run"]
    assert_one_line_error(called("train_td3", *own), "--sigma")
    own += ["--sigma", "0.25"]
    for arguments, parts in (
        ([], ["drawn at random", "checkpoint"]),
        (["--checkpoint", "none.pth"], ["none.pth cannot be read"]),
        (["--checkpoint", "net.pth", "--network-arguments", "classes=4"], ["[3, 16]", "[4, 16]"]),
        (["--checkpoint", "net.pth", "--network-arguments", "classes"], ["NAME=VALUE"]),
        (["--checkpoint", "net.pth", "--normalize", "0.5,0.4"], ["--normalize"]),
        (["--checkpoint", "net.pth", "--normalize", "0.5", "many"], ["list of numbers"]),
        (["--checkpoint", "net.pth", "--keep", "middle"], ["middle"]),
        (["--checkpoint", "net.pth", "--images", "3"], ["least reachable"]),
    ):
        assert_one_line_error(called("train_td3", *own, *arguments), *parts)
    assert_one_line_error(called("train_td3", *own[:2], *own[-2:], "--checkpoint", "net.pth"), "data is None")
    assert_one_line_error(called("train_td3", "--env", "ARQ-ResNet50-v0", "--data", "photos"), "drawn at random")
    assert_one_line_error(called("finalize", "W4A4", *own[:2], *own[-2:]), "give --data")
    assert_one_line_error(called("finalize", "W4A4", *own[:4]), "--sigma")
    assert_one_line_error(called("finalize", "W4A4", "--env", "ARQ-VGG-v0"), "choose one of")
    assert not (tmp_path / "run").exists()
