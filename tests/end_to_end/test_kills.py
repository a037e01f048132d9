"""Scripts stopped at random moments, worker processes beside them, or by a disk that fills up: the same command ends alike.

``ARQ_KILLS=20 ARQ_KILLS_RESULT=experiments/results/kills.json pytest -m slow -n 0 tests/end_to_end/test_kills.py`` stops each
twenty times, and notes it.
"""

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
import torch

from arq_env.support.files import write_json
from arq_env.support.provenance import provenance
from tests.end_to_end.scripts import ROOT, interruptible, path_of
from tests.own import trained_state, write_images

#: Times that each script is stopped, and what the random moments follow from.
POINTS, SEED = int(os.environ.get("ARQ_KILLS", "3")), os.environ.get("ARQ_KILLS_SEED", "0")
RESULT = os.environ.get("ARQ_KILLS_RESULT")
FULL = "full disk"
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, FULL)

#: The smallest network and data with which each script still writes every kind of file that it has.
OWN = ["--network", "tests.own:make_net", "--data", "photos", "--sigma", "0.25"]
TRAINED = [*OWN, "--checkpoint", "net.pth"]
SEARCH = [*TRAINED, "--images", "12", "--calibration-images", "32", "--training", "gaussian"]
LEVERS = ["features", "demonstrations", "onehot", "exchange"]
FINISH = ["finalize", "W4A4", *TRAINED, "--epochs", "3", "--images", "90", "--batch", "30", "--every", "5", "--n", "20"]
FINISH += ["--engine", "serial", "--output", "final"]
COMMANDS = {
    "search": [
        "train_td3",
        *SEARCH,
        "--budget",
        "0.06",
        "--episodes",
        "72",
        "--add",
        *LEVERS,
        "--test-images",
        "6",
        "--test-n",
        "20",
    ]
    + ["--finish", "3", "--engine", "serial", "--output", "out"],
    "any budget": ["train_any_budget", *SEARCH, "--algorithm", "td3+features+demonstrations", "--low", "0.04", "--high", "0.1"]
    + ["--budgets", "0.05", "0.08", "--episodes", "24", "--engine", "serial", "--output", "out"],
    "pretrain": ["pretrain", *OWN, "--epochs", "4", "--batch", "30", "--output", "out"],
    "finalize": [*FINISH[:-1], "out"],
    "certify": ["certify", "final", "--data", "photos", "--base", OWN[1], "--n", "500", "--output", "out"],
    "certify map": [
        "certify_map",
        "final/bit_widths.json",
        "--n",
        "50",
        "--every",
        "2",
        "--processes",
        "2",
        "--output",
        "out/map.json",
    ],
    "compare": ["compare_searches", *SEARCH, "--methods", "uniform", "td3", "--seeds", "1", "--episodes", "22", "--budget", "0.06"]
    + ["--steps", "2", "--every", "5", "--n", "20", "--processes", "2", "--output", "out"],
    "export": ["export", "final", "--base", OWN[1], "--input-shape", "1", "12", "12", "--output", "out"],
}


def started(command: list[str], folder: Path, most: int | None = None) -> subprocess.Popen:
    """A script at work in a folder.

    :param most: bytes beyond which no file can grow, as on a disk that is full
    """

    def prepare():
        interruptible()
        if most is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # for networks of the tests
    (folder / "sent").mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, str(path_of(command[0])), *command[1:]],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": places, "TMPDIR": str(folder / "sent"), "TQDM_DISABLE": "1"},
        preexec_fn=prepare,
    )


def ended(process: subprocess.Popen) -> str:
    """What a script said, once none of its processes is left."""
    _, said = process.communicate(timeout=300)
    for _ in range(600):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return said
        time.sleep(0.1)
    raise AssertionError("a worker outlived its script by a minute")


def left(folder: Path) -> dict:
    """What a run left, file by file, without times: of those that are shown (TensorBoard, reports) it is there or not."""
    files = [path for path in sorted(folder.glob("**/*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): content(path) for path in files if not {"tensorboard", "sent"} & {*path.parts}}


def content(path: Path):
    """Of a file, to compare."""
    if path.suffix == ".tsv":  # the sixth column is the time
        return [line.split("\t")[:5] + line.split("\t")[6:] for line in path.read_text().splitlines()]
    if path.suffix in (".json", ".jsonl"):
        documents = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return [json.loads(text, object_pairs_hook=timeless) for text in documents]
    if path.name == "agent.zip":
        with zipfile.ZipFile(path) as file:
            return [file.read(part) for part in sorted(file.namelist()) if part.endswith(".pth")]
    if path.suffix == ".safetensors":  # whose header has no order
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        return json.loads(data[8 : 8 + length]), data[8 + length :]
    if path.suffix == ".pt":  # equal values are written in other bytes after they were read
        return plain(torch.load(path, weights_only=True))
    return None if path.suffix == ".html" or path.name == "time.png" else path.read_bytes()


def plain(value):
    """With tensors as what Python compares."""
    if isinstance(value, dict):
        return timeless([(key, plain(entry)) for key, entry in value.items()])
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return (value.dtype, value.tolist()) if isinstance(value, torch.Tensor) else value


def timeless(pairs: list[tuple]) -> dict:
    return {key: value for key, value in pairs if "second" not in str(key)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with data, a trained network, and one that finalize.py has finished."""
    folder = tmp_path_factory.mktemp("prepared")
    write_images(folder / "photos", {"train": 60, "val": 10})
    torch.save({"state_dict": trained_state()}, folder / "net.pth")
    process = started(FINISH, folder)
    said = ended(process)
    assert process.returncode == 0, said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_stopped_at_random_moments(tmp_path, prepared, name):
    """All files are the same then, the command line in them included."""
    command, folder = COMMANDS[name], tmp_path / "work"

    def anew():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(prepared, folder)

    def whole():
        process = started(command, folder)
        said = ended(process)
        assert process.returncode == 0, said
        return left(folder)

    anew()
    start = time.monotonic()
    expected = whole()
    duration = time.monotonic() - start
    made = [path for path in (folder / "out").glob("**/*") if path.is_file()]
    largest = max(path.stat().st_size for path in made)
    moments = random.Random(f"{SEED} {name}")
    ends = moments.sample(ENDS, len(ENDS))
    ended_so = dict.fromkeys((getattr(end, "name", end) for end in ENDS), 0)
    for point in range(POINTS):
        anew()
        end = ends[point % len(ENDS)]
        ended_so[getattr(end, "name", end)] += 1
        if end == FULL:
            most = int(64 * (largest / 64) ** moments.uniform(0, 1))  # with less there is no semaphore, which lies in memory
            process = started(command, folder, most)
            said = ended(process)
            told = [line for line in said.splitlines() if line.startswith(("error: ", "Traceback"))]
            assert process.returncode in (0, 2) and "Traceback" not in said, (most, said)
            assert len(told) == (process.returncode == 2), (most, said)
            when = most
        else:
            when = moments.uniform(0.3, 1) * duration
            process = started(command, folder)
            time.sleep(when)
            process.send_signal(end)
            said = ended(process)
            assert "Traceback" not in said, (when, end, said)
        after = whole()
        assert after.keys() == expected.keys(), (when, end)
        assert [file for file in after if after[file] != expected[file]] == [], (when, end)
    assert not list((folder / "sent").glob("arq-*"))  # what workers were sent
    if RESULT:
        path = Path(RESULT)
        known = json.loads(path.read_text())["stopped"] if path.exists() else {}
        write_json(path, {"stopped": known | {name: ended_so | {"files_compared": len(expected)}}, "provenance": provenance()})
