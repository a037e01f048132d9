"""The README is short, its links lead somewhere, and its Python runs."""

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.own import trained_state, write_images

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_can_be_read_in_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 1_200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_are_there(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"(?:arq_env|agents|experiments|tests|docs)/[\w./-]+\.(?:py|md|json)\b", text):
        assert (ROOT / path).exists(), path


def python_of_the_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_python_of_the_readme_runs(problem, tmp_path, monkeypatch):
    environment, _, certifier = python_of_the_readme()
    monkeypatch.chdir(tmp_path)
    images, labels = problem.test_images(every=10)
    exec(certifier.replace("10_000", "1_000"), {"network": problem.network, "images": images, "labels": labels})
    assert (tmp_path / "log.tsv").exists()
    done: dict = {}
    exec(environment.replace("2_700", "18"), done)
    assert done["info"]["bops_fraction"] <= 0.015625 and done["reward"] == done["info"]["reward"]


def test_the_path_of_one_s_own_network_is_ten_lines_and_runs(tmp_path, monkeypatch):
    _, own, _ = python_of_the_readme()
    assert len([line for line in own.splitlines() if line]) == 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mymodels.py").write_text("from tests.own import make_net\n")
    torch.save(trained_state(), "net.pth")
    write_images(tmp_path / "photos", {"train": 40, "test": 4})
    shorter = (
        own.replace("episodes=150", "episodes=2").replace("(sigma=0.25)", "(sigma=0.25, epochs=1, batch=20)").replace("1_000", "50")
    )
    done: dict = {}
    exec(shorter, done)
    assert (tmp_path / "run" / "bit_widths.json").exists() and len(done["certificates"]) == 12 and done["certificates"].acr > 0.1
