"""The script that measures the reward's own noise: its mistakes, and what it computes from draws."""

import json
import runpy

import numpy as np
import pytest

from tests.end_to_end.scripts import ROOT, assert_one_line_error, path_of


@pytest.fixture
def script():
    return runpy.run_path(str(path_of("reward_noise")), run_name="not main")


def test_a_folder_without_maps(called, tmp_path):
    assert_one_line_error(called("reward_noise", "--maps", tmp_path, "--output", tmp_path / "out"), "holds no run folder", "--maps")


def test_what_all_maps_share_in_a_draw_is_no_noise(script):
    rng = np.random.default_rng(0)
    true = np.linspace(0.9, 1, 12)
    shared = rng.normal(0, 0.5, 400)
    drawn = [{"ratios": (true + s + rng.normal(0, 0.01, 12)).tolist(), "seconds": 1.0} for s in shared]
    row = script["summary"]((2_000, 1, 320), "all", drawn, true)
    assert row["paired_standard_deviation"] == pytest.approx(0.01 * (11 / 12) ** 0.5, rel=0.03)  # less their own mean's
    assert row["spearman_least"] <= row["spearman"] <= 1 and row["draws"] == 400


def test_maps_that_differ_are_taken_evenly(script, tmp_path):
    class Options:
        maps, count = ROOT / "experiments" / "results" / "compare" / "budget0.007", 5

    files, header, maps = script["chosen_maps"](Options)
    assert header["network"] == "resnet20" and 3 <= len(maps) <= 5 and len(files) == len(maps)
    assert len({json.dumps(bit_widths) for bit_widths in maps}) == len(maps)
