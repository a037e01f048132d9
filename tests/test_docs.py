"""The site: every public name is in the reference with what it is, and pages load nothing from elsewhere."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODULES = re.findall(r"automodule:: ([\w.]+)", "".join(page.read_text() for page in sorted((DOCS / "reference").glob("[!_]*.md"))))
#: What no user calls: how parts of a page, a graph or a chunk are made.
INTERNAL = {
    "arq_agents",
    "arq_agents.zoo",
    "arq_agents.zoo.ddpg",
    "arq_agents.zoo.sac",
    "arq_agents.zoo.td3",
    "arq_env.budget.bops",
    "arq_env.budget.latency",
    "arq_env.budget.size",
    "arq_env.certification.certificates",
    "arq_env.certification.chunks",
    "arq_env.certification.compiled",
    "arq_env.certification.counting",
    "arq_env.certification.replaying",
    "arq_env.certification.sequential",
    "arq_env.certification.smoothing",
    "arq_env.datasets.cache",
    "arq_env.export",
    "arq_env.networks",
    "arq_env.report",
    "arq_env.support",
    "arq_env.support.batches",
    "arq_env.support.torchvision_import",
}


def public(module):
    """Names that a module says are for its users."""
    there = getattr(module, "__all__", None)
    return there or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]


def test_every_module_is_in_the_reference_once():
    there = {
        "arq_" * (folder == "agents") + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for folder in ("arq_env", "agents")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert len(MODULES) == len(set(MODULES)) and not INTERNAL & set(MODULES)
    assert there == INTERNAL | set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_says_what_it_is(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public_name in public(module):
        value = getattr(module, public_name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert value.__doc__, f"{name}.{public_name}"
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            own = inspect.isfunction(member) or isinstance(member, property)
            if own and not method.startswith("_") and not getattr(value, "_is_protocol", False):
                assert inspect.getdoc(getattr(value, method)), f"{name}.{public_name}.{method}"


def test_what_the_pages_import_is_public():
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "examples").glob("*.py")]
    found = re.findall(r"^from (arq_[\w.]+) import (.+)$", "\n".join(page.read_text() for page in pages), re.MULTILINE)
    assert len(found) > 5
    for module, names in found:
        for name in re.findall(r"\w+", names.partition(" as ")[0]):
            there = getattr(importlib.import_module(module), name)
            home = module if name in public(importlib.import_module(module)) else there.__module__
            assert home in MODULES, f"{module}.{name}"


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_network(tmp_path):
    """Without a warning, such as of a reference to nothing; with every public name of a package in the index."""
    pytest.importorskip("furo")
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert not re.findall(r"<(?:script|img|iframe)[^>]*https?://|<link[^>]*rel=\"(?:stylesheet|preload)\"[^>]*https?://", pages)
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?https?://", style.read_text())
    with (tmp_path / "objects.inv").open("rb") as stream:
        inventory = InventoryFile.load(stream, "", lambda base, to: to)
    names = {name for kind, entries in inventory.items() if kind.startswith("py:") for name in entries}
    for module in MODULES:
        for name in public(importlib.import_module(module)):
            value = getattr(importlib.import_module(module), name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert f"{module}.{name}" in names or f"{value.__module__}.{name}" in names, f"{module}.{name}"
