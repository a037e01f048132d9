"""The examples and the notebook run as they stand, but for their length."""

import re
import subprocess
import sys

import pytest

from tests.end_to_end.scripts import ROOT

FOLDER = ROOT / "examples"
RUNS = {
    "certify_any_classifier": (["--images", 20, "--n", 100], r"20 images: ACR 0\.\d+, clean accuracy 0\.\d+"),
    "custom_reward": (["--episodes", 3, "--images", 32], r"ACR 0\.\d+ at \d+\.\d% of FP32's size, reward -\d"),
    "own_network": (["--steps", 100, "--n", 20], r"found and finished: ACR 0\.\d+"),
    "vectorised": (["--episodes", 4, "--images", 32], r"4 episodes on 2 processes, best reward -\d"),
}


def test_every_example_is_here():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tmp_path):
    arguments, said = RUNS[name]
    command = [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(said, done.stdout), (done.stdout, done.stderr)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(FOLDER / "first_steps.ipynb", 4)
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))
    fewer = {"images=200, calibration_images=200": "images=32, calibration_images=32", "n=500": "n=50"}
    for cell in notebook.cells:
        for old, new in fewer.items():
            cell.source = cell.source.replace(old, new)
    # in a process of its own, where nothing turns a kernel's warnings into errors
    nbformat.write(notebook, tmp_path / "short.ipynb")
    run = "import nbclient, nbformat; nbclient.execute(nbformat.read('short.ipynb', 4), timeout=600)"
    done = subprocess.run([sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2_000:]
