"""Scripts stopped at random moments, worker processes beside them, or by a disk that fills up: the same command ends alike."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.end_to_end.scripts import ROOT, assert_one_line_error, path_of, script

#: Moments at which each script is stopped: one for each signal, or as many as the environment says.
POINTS = int(os.environ.get("ARQ_KILLS", "3"))
SEARCH = ["train_td3", "--env", "ARQ-ResNet20-Signs-v0", "--episodes", "22", "--test-images", "20", "--test-n", "100"]
CERTIFY = ["certify_map", "experiments/results/signs-sigma0.5-td3", "--every", "60", "--n", "300"]


def left(folder: Path) -> dict:
    """What a run left, file by file, without the times that it took and what a kill may leave hidden."""
    found = {}
    for path in sorted(folder.glob("**/*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".tsv":  # the sixth column is the time
            found[name] = [line.split("\t")[:5] + line.split("\t")[6:] for line in path.read_text().splitlines()]
        elif path.name == "trace.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        elif path.name == "agent.zip":
            with zipfile.ZipFile(path) as file:
                found[name] = [file.read(part) for part in sorted(file.namelist()) if part.endswith(".pth")]
        elif path.suffix == ".json":
            found[name] = path.read_bytes()
    return found


def stopped(command: list[str], seconds: float, end: signal.Signals, **environment: str) -> None:
    """Start a script, send it a signal after some seconds, and wait until none of its processes is left."""
    process = subprocess.Popen(
        [sys.executable, str(path_of(command[0])), *command[1:]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ | environment,
    )
    time.sleep(seconds)
    process.send_signal(end)
    process.wait()
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlived its script by a minute")


@pytest.mark.slow
@pytest.mark.parametrize("command", [SEARCH, CERTIFY], ids=lambda command: command[0])
def test_stopped_at_random_moments(tmp_path, command):
    """SIGKILL, SIGTERM and SIGINT; files are the same bytes, the command line in them included."""
    if command is CERTIFY:  # beside the map, where the tables of certificates go
        shutil.copytree(ROOT / CERTIFY[1], tmp_path / "map")
        command = [CERTIFY[0], str(tmp_path / "map"), *CERTIFY[2:]]
    output = tmp_path / ("run" if command[0] == "train_td3" else "map/result.json")
    command = [*command, "--processes", "2", "--output", str(output)]
    (tmp_path / "sent").mkdir()
    environment = {"TMPDIR": str(tmp_path / "sent")}
    start = time.monotonic()
    assert script(*command, **environment).returncode == 0
    duration, folder = time.monotonic() - start, output if output.suffix == "" else output.parent
    whole = left(folder)
    assert len(whole) > 3
    moments = random.Random(0)
    for point in range(POINTS):
        if command[0] == "train_td3":
            shutil.rmtree(folder)
        else:
            shutil.rmtree(folder / "certificates")
            output.unlink()
        end = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[point % 3]
        seconds = moments.uniform(0.3, 1.0) * duration if point % 2 else moments.uniform(0, 1) * duration
        stopped(command, seconds, end, **environment)
        done = script(*command, **environment)
        assert done.returncode == 0, (seconds, end, done.stderr)
        assert left(folder) == whole, (seconds, end)
    assert not list((tmp_path / "sent").glob("arq-*"))  # what workers were sent


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 2_000, 200_000])
def test_a_disk_that_fills_up(tmp_path, size):
    """No file can grow beyond some bytes: one line; with room again the same command ends as if nothing had been."""
    command = [*SEARCH[:3], "--episodes", "2", "--test-images", "4", "--test-n", "50"]
    output = tmp_path / "run"
    command += ["--processes", "2", "--output", str(output)]
    assert script(*command).returncode == 0
    whole = left(output)
    shutil.rmtree(output)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    done = subprocess.run(
        [sys.executable, str(path_of(command[0])), *command[1:]], cwd=ROOT, capture_output=True, text=True, preexec_fn=limit
    )
    said = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert done.returncode in (0, 2) and "Traceback" not in said, done.stderr
    if size < 100:
        done.stderr = "\n".join(said)
        assert_one_line_error(done, "cannot write")
    assert script(*command).returncode == 0
    assert left(output) == whole
