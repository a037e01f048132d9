"""The command ``arq-env``, ``--config``, ``--quiet``, and what may have been meant."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from arq_agents import console, shared_options
from arq_env.support.errors import did_you_mean, reason
from tests.end_to_end.scripts import assert_one_line_error, script

ROOT = Path(__file__).parents[1]


def test_every_script_is_a_command(monkeypatch, capsys):
    assert sorted(console.COMMANDS) == sorted(path.stem for path in (ROOT / "experiments").glob("[!_]*.py"))
    monkeypatch.setattr(sys, "argv", ["arq-env", "--help"])
    with pytest.raises(SystemExit):
        console.main()
    said = capsys.readouterr().out
    for name in console.COMMANDS:
        summary = console._summary(name)
        assert name.replace("_", "-") in said and summary.endswith((".", "?")) and len(summary) < 132, name


def test_a_command_is_called_as_it_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["arq-env", "finalize", "--help"])
    with pytest.raises(SystemExit):
        console.main()
    assert capsys.readouterr().out.startswith("usage: arq-env finalize ")


def test_a_wrong_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["arq-env", "finalise"])
    with pytest.raises(SystemExit) as end:
        console.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "did you mean finalize?" in said


def parsed(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments/train_td3.py", *map(str, arguments)])
    return shared_options.search_options("td3")


def test_options_of_a_recorded_run(monkeypatch, tmp_path):
    """Those given count, and what is then recorded is all of them, so that it can be taken from there again."""
    recorded = "python experiments/train_td3.py --budget 0.007 --seed 3 --add onehot"
    (tmp_path / "config.json").write_text(json.dumps({"provenance": {"command": recorded}}))
    for named in (tmp_path, tmp_path / "config.json"):
        options = parsed(monkeypatch, "--seed", 4, "--config", named)
        assert (options.budget, options.seed, options.add) == (0.007, 4, ["onehot"])
        assert sys.argv[1:] == ["--budget", "0.007", "--add", "onehot", "--seed", "4"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say how it was made"):
        parsed(monkeypatch, "--config", tmp_path)


def test_without_bars(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "")
    assert parsed(monkeypatch, "--quiet").seed == 0 and os.environ["TQDM_DISABLE"] == "1"


def test_what_may_have_been_meant(monkeypatch, capsys, tmp_path):
    for arguments, meant in ((["--budgt", "1"], "--budget"), (["--add", "onestp"], "onestep")):
        with pytest.raises(SystemExit):
            parsed(monkeypatch, *arguments)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f", did you mean {meant}?" in said
    (tmp_path / "td3-run").mkdir()
    with pytest.raises(FileNotFoundError) as error:
        (tmp_path / "td3-rn" / "config.json").read_text()
    assert reason(error.value).endswith(f", did you mean {tmp_path / 'td3-run'}?")
    assert did_you_mean("x", ["abcdef"]) == ""


def test_help_is_grouped():
    said = script("train_td3", "--help").stdout
    for group in ("the environment", "a network and data of your own", "the search", "after the search", "the machine"):
        assert f"\n{group}:\n" in said


@pytest.mark.slow
def test_a_wheel_does_the_main_job_without_the_repository(tmp_path):
    """Search, finish, export and check, from an empty folder, with what the wheel brings alone."""
    left_out = shutil.ignore_patterns(".*", "results", "runs", "tests", "build", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "there", wheel], check=True)
    (tmp_path / "empty").mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "there"), "OMP_NUM_THREADS": "1"}

    def arq_env(*arguments):
        command = [sys.executable, tmp_path / "there/bin/arq-env", *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True)

    where = subprocess.run(
        [sys.executable, "-c", "import arq_env, arq_agents.commands as c; print(arq_env.__file__, c.__file__)"],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
    ).stdout
    assert where.count(str(tmp_path / "there")) == 2
    small = ["--env", "ARQ-ResNet20-Signs-v0", "--images", 64, "--calibration-images", 64, "--episodes", 2]
    done = arq_env("train-sac", *small, "--test-images", 8, "--test-n", 20, "--output", "run")
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "empty/run/config.json").read_text())
    assert config["provenance"]["command"].startswith("arq-env train-sac --env ARQ-ResNet20-Signs-v0 ")
    again = arq_env("train-sac", "--config", "run")
    assert again.returncode == 0 and "exported" in again.stdout, again.stderr
    done = arq_env("finalize", "run", "--epochs", 1, "--images", 256, "--every", 400, "--n", 20, "--output", "finished")
    assert done.returncode == 0, done.stderr
    done = arq_env("export", "finished", "--format", "packed")
    assert done.returncode == 0 and (tmp_path / "empty/finished/network.arq.safetensors").exists(), done.stderr
    assert_one_line_error(arq_env("certify", "finishd/network.arq.safetensors", "--data", "signs"), "did you mean", "finished")
