"""What all scripts share, and what those print that only read: options, mistakes in one line, tables."""

import json
import runpy
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest

from arq_env import ArqError
from arq_env.certification import Certificates
from arq_env.problem import load_mapped
from arq_env.rewards import settings_of
from tests.end_to_end.scripts import ROOT, assert_one_line_error, interruptible, path_of, script


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "experiments").glob("**/[!_]*.py"))])
def test_help(called, name):
    done = called(name, "--help")
    assert done.returncode == 0 and "--output" in done.stdout


def test_help_imports_nothing_that_takes_seconds():
    scripts = [str(path) for path in sorted((ROOT / "experiments").glob("**/[!_]*.py"))]
    code = f"""
import runpy, sys
sys.argv[1:] = ["--help"]
for script in {scripts}:
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, script
print(sorted({{"torch", "scipy", "stable_baselines3", "matplotlib", "tensorboard", "altair"}} & {{*sys.modules}}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr


@pytest.mark.parametrize(
    "name, arguments", [("train_td3", ["--env", "ARQ-ResNet20-Signs-v0"]), ("compare_searches", ["--methods", "random"])]
)
@pytest.mark.parametrize("seconds", [0.0, 0.3, 0.8])
def test_ctrl_c_while_a_script_starts(tmp_path, name, arguments, seconds):
    """One line and exit code 130, from a script's first line on: what Python needs before is measured, on a busy machine more."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "from arq_agents import command_line"], cwd=ROOT, check=True)
    seconds += 1.5 * (time.monotonic() - begun)
    command = [sys.executable, str(path_of(name)), *arguments, "--output", tmp_path / "run"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=interruptible) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130 and said.startswith("interrupted: ") and said.count("\n") == 1, said


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
        (["--test-n", "0"], ["whole number from 10"]),
        (["--env", "CartPole-v1"], ["ARQ-ResNet20-v0"]),
        (["--budget", "much"], ["--budget"]),
        (["--device", "abacus"], ["cpu or cuda"]),
    ],
)
def test_mistakes_are_one_line(called, tmp_path, arguments, parts):
    output = tmp_path / "run"
    defaults = ["--env", "ARQ-ResNet20-Signs-v0"] if "--env" not in arguments else []
    assert_one_line_error(called("train_td3", *defaults, *arguments, "--output", output), *parts)
    assert not output.exists()


@pytest.mark.slow
def test_no_space_for_the_data(tmp_path):
    """A cache folder that cannot be made stands for a full disk: both are the same OSError to the code."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = script("train_td3", "--env", "ARQ-ResNet20-Signs-v0", "--output", tmp_path / "run", ARQ_DATA=str(blocked / "cache"))
    assert_one_line_error(done, "ARQ_DATA")


def test_malformed_map(called, tmp_path):
    (tmp_path / "bit_widths.json").write_text("{}")
    assert_one_line_error(called("certify_map", tmp_path), "bit-width map")
    assert_one_line_error(called("certify_map", tmp_path / "none.json"), "cannot be read")


def test_a_map_of_ones_own_network(called, tmp_path):
    """One that was given as an object cannot be built again; the scripts say what to call."""
    (tmp_path / "bit_widths.json").write_text('{"network": null, "dataset": null, "sigma": 0.5}')
    for name in ("certify_map", "finalize"):
        assert_one_line_error(called(name, tmp_path), "given as an object", "finishing.finish", "compare_maps")


def test_maps_that_do_not_fit_what_they_say(tmp_path):
    """The map of a run, edited: one over its budget is used and said to be; headers of other things are refused."""
    source, path = ROOT / "experiments/results/signs-sigma0.5-td3/bit_widths.json", tmp_path / "map.json"
    document = json.loads(source.read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_mapped(source)
    for layer in document["layers"]:
        layer |= {"weight_bits": 8, "activation_bits": 8}
    path.write_text("\ufeff" + json.dumps(document), encoding="utf-8")
    with pytest.warns(UserWarning, match=r"costs 6.2500% of FP32's bit operations, more than its budget of 1.5625%"):
        _, bit_widths, read, _ = load_mapped(path)
    assert set(bit_widths.values()) == {(8, 8)} and settings_of(read).images == document["provenance"]["certifier"]["images"]
    for change in (
        {"sigma": True},
        {"sigma": float("nan")},
        {"sigma": 10**400},
        {"network": ["resnet20"]},
        {"dataset": 3},
        {"provenance": []},
        {"provenance": {"training": {}}},
        {"layers": None},
    ):
        path.write_text(json.dumps(document | change))
        with pytest.raises(ArqError) as error:
            load_mapped(path)
        assert "\n" not in str(error.value)
    for certifier in (3, [], {"images": "x"}, {"alpha": "x"}, {"pixels": 3}):
        with pytest.raises(ArqError):
            settings_of({"provenance": {"certifier": certifier}})


@pytest.mark.parametrize(
    "arguments",
    [["--epochs", "0"], ["--sigma", "-1"], ["--device", "abacus"], ["--batch", "1000000"], ["--start", "resnet20-nothing"]],
)
def test_pretraining_mistakes(called, tmp_path, arguments):
    assert_one_line_error(called("pretrain", "--dataset", "signs", *arguments, "--output", tmp_path / "run"))


@pytest.mark.parametrize("wanted, part", [("nothing", "FP32 or W4A4"), ("W9A1", "weight bits 9"), ("W4A4", "sigma7")])
def test_finalizing_mistakes(called, tmp_path, wanted, part):
    sigma = "7" if part == "sigma7" else "0.5"
    done = called("finalize", wanted, "--dataset", "signs", "--sigma", sigma, "--output", tmp_path / "out")
    assert_one_line_error(done, part)
    assert not (tmp_path / "out").exists()


def test_agreement_of_rankings(tmp_path):
    """Perfect, reversed and none, and a table of finished maps that a kill cut short."""
    functions = runpy.run_path(str(ROOT / "experiments/studies/rank_maps.py"))
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


def test_unknown_checkpoint(called, tmp_path):
    done = called("certify_checkpoints", "resnet20-nothing", "--output", tmp_path / "out")
    assert_one_line_error(done, "resnet20-signs-sigma0.5-gaussian")
    assert not (tmp_path / "out").exists()


def test_finals_are_compared(called, tmp_path):
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
    done = called("compare_finished", *folders.values(), "--output", tmp_path / "finals.json")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "finals.json").read_text())
    rows = {row["map"]: row for row in document["rows"]}
    against = rows["made up"]["against_fp32"]
    assert against["shipped"]["acr_ratio"] == pytest.approx(0.9) and against["finished_alike"]["acr_ratio"] == pytest.approx(0.75)
    assert against["shipped"]["acr_difference"] == pytest.approx(-0.1 * shipped["acr"])
    assert against["shipped"]["acr_difference_standard_error"] == pytest.approx(0.1 * shipped["acr_standard_error"])
    assert against["shipped"]["acr_ratio_standard_error"] < 1e-6  # all radii shrink alike
    bound, ratio, error = (against["finished_alike"][f"acr_ratio{name}"] for name in ("_lower_bound", "", "_standard_error"))
    assert bound == pytest.approx(ratio - 1.6449 * error, abs=1e-9)
    assert "finished_alike" not in rows["longer"]["against_fp32"]  # another recipe than the FP32 network's
    (pair,) = document["pairs"]
    assert pair["maps"] == ["FP32", "made up"] and pair["acr_difference"] == pytest.approx(0.3 * shipped["acr"])
    assert list(rows) == ["FP32 as shipped", "FP32", "made up", "longer"]
    for text in ("FP32 as shipped", "made up", "1.000%", "77,777", "0.900 +- 0.000 (> 0.8", "0.750 +- 0.000 (> 0.7"):
        assert text in done.stdout
    assert (tmp_path / "finals.md").read_text() == done.stdout
    tmp_path = folders["made up"]
    (tmp_path / "summary-n1000.json").write_text(json.dumps(final | {"checkpoint": "0" * 64}))
    assert_one_line_error(called("compare_finished", tmp_path, "--output", tmp_path / "finals.json"), "other weights")
    assert_one_line_error(called("compare_finished", tmp_path / "nothing"), "finalize.py")


def test_report_mistakes(called, tmp_path, monkeypatch):
    final = ROOT / "experiments/results/finals/cifar10-sigma0.5-consistency-FP32"
    assert_one_line_error(called("report", tmp_path), "holds nothing to report")
    assert_one_line_error(called("report", tmp_path / "none"), "holds nothing to report")
    (tmp_path / "file").write_text("")
    pytest.importorskip("vl_convert")
    blocked = called("report", final, "--output", tmp_path / "file" / "below")
    assert_one_line_error(blocked, "cannot write")
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert_one_line_error(called("report", final), 'pip install -e ".[report]"')
