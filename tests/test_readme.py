"""The README is short, its links lead somewhere, and its Python runs."""

import re
from pathlib import Path

import pytest

from tests.toy import SHAPE

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


def test_python_of_the_readme_runs(problem, tmp_path, monkeypatch):
    environment, own, certifier = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    images, labels = problem.test_images(every=10)
    cifar = {"load_dataset": lambda name: problem.dataset}
    own = own.replace("from arq_env.datasets import load_dataset\n", "").replace("sigma=0.25", f"sigma=0.5, input_shape={SHAPE}")
    exec(own.replace("budget=0.02", "budget=0.03"), {"network": problem.network} | cifar)
    exec(certifier.replace("10_000", "1_000"), {"network": problem.network, "images": images, "labels": labels})
    assert (tmp_path / "log.tsv").exists()
    done: dict = {}
    exec(environment.replace("ARQ-ResNet20-v0", "ARQ-ResNet20-Signs-v0"), done)
    assert done["info"]["bops_fraction"] <= 0.015625 and done["reward"] == done["info"]["reward"]
