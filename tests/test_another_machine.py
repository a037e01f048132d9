"""A run is taken up on another machine: what can go on does, and what cannot says why and leaves everything as it is."""

import os
import platform

import numpy as np
import pytest
import torch

from arq_agents import run_folder
from arq_env import ArqError
from arq_env.certification import certify
from arq_env.evaluation import Evaluator
from arq_env.support.provenance import provenance
from tests.hostile import contents, outcome_of
from tests.test_certify import halfspace
from tests.test_inputs import ASK, IMAGES
from tests.toy import outcome, search_toy


@pytest.fixture
def moved(monkeypatch):
    """Call it, and this is another computer, with the same packages."""

    def move():
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        monkeypatch.setattr(os, "cpu_count", lambda: 3)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "OTHER")
        assert provenance()["hardware"] == "riscv64, 3 cores, OTHER"

    return move


def test_certificates_go_on(tmp_path, moved):
    whole = certify(halfspace, IMAGES, np.zeros(5), log=tmp_path / "whole.tsv", name="half", **ASK)
    certify(halfspace, IMAGES, np.zeros(5), log=tmp_path / "cut.tsv", name="half", **ASK)
    lines = (tmp_path / "cut.tsv").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.tsv").write_bytes(b"".join(lines[:3]) + lines[3][:7])  # as a kill leaves it
    moved()
    seen = []

    def classifier(batch):
        seen.append(len(batch))
        return halfspace(batch)

    gone_on = certify(classifier, IMAGES, np.zeros(5), log=tmp_path / "cut.tsv", name="half", **ASK)
    assert sum(seen) == 3 * 16 and (gone_on.radius == whole.radius).all()


def cut(folder):
    """As a kill leaves a search: without its last episode and its map."""
    trace = folder / "trace.jsonl"
    trace.write_bytes(b"".join(trace.read_bytes().splitlines(keepends=True)[:-1]))
    (folder / "bit_widths.json").unlink()


def test_a_search_of_exact_rewards_goes_on(tmp_path, moved):
    search_toy(tmp_path, "random", episodes=4)
    whole = outcome(tmp_path)
    cut(tmp_path)
    moved()
    search_toy(tmp_path, "random", episodes=4)
    assert outcome(tmp_path) == whole and contents(tmp_path).keys() >= {tmp_path / "bit_widths.json"}


@pytest.mark.parametrize("what", ["versions", "rounding", "device"])
def test_a_search_whose_rewards_might_differ_says_what_differs(tmp_path, monkeypatch, what):
    """Another torch, or rewards that round by processor."""
    search_toy(tmp_path, "random", episodes=4)
    cut(tmp_path)
    if what == "versions":
        here = provenance()
        other = here | {"versions": here["versions"] | {"torch": "2.5.0"}}
        monkeypatch.setattr(run_folder, "provenance", lambda: other)
    elif what == "rounding":
        monkeypatch.setattr(Evaluator, "rounding", "avx512, 2 threads")
    else:
        real = run_folder.evaluation_identity
        monkeypatch.setattr(run_folder, "evaluation_identity", lambda evaluator: real(evaluator) | {"device": "cuda"})
    _, refused = outcome_of(lambda: search_toy(tmp_path, "random", episodes=4), tmp_path, ArqError)
    assert f"differs in {what}" in refused and "choose another --output" in refused
