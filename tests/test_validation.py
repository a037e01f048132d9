"""Whether a folder's check finds every number that was edited by hand."""

import copy
import json
import shutil

import pytest

from arq_agents import validation
from arq_agents.validation import Sample, check_folder
from arq_env import ArqError
from arq_env.bitwidths import load_map, uniform
from arq_env.comparison import compare_maps
from arq_env.evaluation import Evaluator
from arq_env.support.engines import Engine
from arq_env.support.files import write_json
from arq_env.support.settings import TestSettings
from tests.end_to_end.scripts import ROOT, script
from tests.toy import make_toy_env, search_toy, toy_problem

#: Numbers that no check can know: times, and what the search decided by.
UNKNOWN = ("seconds", "evaluation_seconds", "seed", "hyperparameters", "versions", "provenance", "settings")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished search with certificates, as the main script leaves it."""
    folder, env = tmp_path_factory.mktemp("run"), make_toy_env()
    best = search_toy(folder, "random", 6, env)
    maps = {"W4A4": uniform(env.layers, 4, 4), "found": best.bit_widths}
    comparison = compare_maps(env.evaluator, maps, TestSettings(every=4, n=50), folder=folder / "certificates")
    write_json(folder / "certificates.json", comparison.document(env.evaluator))
    return folder


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The toy network in place of a shipped one, and evaluators that remember from check to check."""
    problem, evaluators = toy_problem(), {}

    def load_mapped(folder):
        return problem, *load_map(folder / "bit_widths.json", problem.layers), folder

    def evaluator(problem, settings):
        made = evaluators.setdefault(settings, Evaluator(problem, settings))
        opinion = evaluators.setdefault(("opinion", settings), made.second_opinion())
        made.second_opinion = lambda: opinion
        return made

    monkeypatch.setattr(validation, "load_mapped", load_mapped)
    monkeypatch.setattr(validation, "Evaluator", evaluator)


def checks(folder, **sample):
    return list(check_folder(folder, Sample(**sample), Engine()))


def leaves(document, path=()):
    """Where the numbers of a document are, without those that cannot be known."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key not in UNKNOWN or path == ("settings",):
                yield from leaves(value, (*path, key))
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from leaves(value, (*path, index))
    elif isinstance(document, int | float) and not isinstance(document, bool):
        yield path


def edited(document, path):
    """The document with one number changed a little."""
    document = copy.deepcopy(document)
    *before, last = path
    place = document
    for key in before:
        place = place[key]
    value = place[last]
    if isinstance(value, int):
        place[last] = value + 1 if value < 5 else value - 1  # bits stay bits
    else:
        place[last] = value * 1.001 + 1e-6
    return document


def caught(folder) -> bool:
    """Whether something does not hold, or the folder is refused."""
    try:
        return any(check.holds is False for check in checks(folder, episodes=0))
    except ArqError:
        return True


@pytest.mark.parametrize("every", [13])
def test_a_run_holds_and_every_edited_number_is_caught(run, tmp_path, every):
    assert {check.holds for check in checks(run)} == {True} and len(checks(run)) == 9
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run"
    missed = []

    def try_all(path, texts):
        whole = path.read_text()
        for what, text in texts[::every]:
            path.write_text(text)
            if not caught(folder):
                missed.append((path.name, what))
        path.write_text(whole)

    for name in ("bit_widths.json", "certificates.json", "config.json"):
        document = json.loads((folder / name).read_text())
        edits = [(leaf, json.dumps(edited(document, leaf))) for leaf in leaves(document)]
        assert len(edits) >= 10
        try_all(folder / name, edits)
    lines = (folder / "trace.jsonl").read_text().splitlines(keepends=True)
    episode = json.loads(lines[2])
    edits = [(leaf, "".join([*lines[:2], json.dumps(edited(episode, leaf)) + "\n", *lines[3:]])) for leaf in leaves(episode)]
    try_all(folder / "trace.jsonl", [*edits, ("an episode left out", "".join(lines[:-1]))])
    for path in (folder / "certificates").glob("*.tsv"):
        header, first, *rest = path.read_text().splitlines(keepends=True)
        edits = []
        for column in (1, 2, 3, 4, 6):  # label, predict, radius, correct, n
            parts = first.split("\t")
            parts[column] = str(float(parts[column]) * 1.01 + 0.001 if column == 3 else int(parts[column]) + 1)
            edits.append((column, "".join([header, "\t".join(parts), *rest])))
        try_all(path, edits)
    assert not missed
    assert {check.holds for check in checks(folder)} == {True}


def test_what_cannot_be_checked_says_so(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(folder / "certificates")
    told = [check for check in checks(folder) if check.holds is None]
    assert len(told) == 3 and "--images 0" in told[0].told
    assert [check for check in checks(folder, images=0) if check.holds is None] == []
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"versions": {"torch": "1"}})
    assert "torch" in next(check for check in checks(folder) if check.what == "versions").told
    write_json(folder / "config.json", config | {"reward_version": 1})
    with pytest.raises(ArqError, match="reward version 1, and this is version 2"):
        checks(folder)
    with pytest.raises(ArqError, match="nothing to check"):
        checks(tmp_path)


def _reward_version(folder) -> int | None:
    return json.loads((folder / "config.json").read_text()).get("reward_version")


#: Committed searches that came to their end: those of today's reward, and three of an earlier one.
ENDED = sorted(
    path.parent for path in (ROOT / "experiments/results").glob("**/bit_widths.json") if (path.parent / "config.json").exists()
)
SEARCHES = [folder for folder in ENDED if _reward_version(folder)] + [folder for folder in ENDED if not _reward_version(folder)][:3]


@pytest.mark.slow
@pytest.mark.parametrize("folder", SEARCHES, ids=str)
def test_committed_searches(folder):
    """Each holds on this machine, or is of an earlier reward and said to be."""
    version = json.loads((folder / "config.json").read_text()).get("reward_version")
    done = script("validate", folder, "--episodes", "1", "--images", "1")
    if version is None:
        assert done.returncode == 2 and "reward version 1" in done.stderr
    else:
        assert done.returncode == 0 and "DOES NOT HOLD" not in done.stdout and "holds: reward of" in done.stdout, done


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder",
    [ROOT / "experiments/results/references", *sorted((ROOT / "experiments/results/finals").glob("cifar10-sigma0.5-*-*-0.*/"))],
    ids=str,
)
def test_committed_certificates(folder):
    done = script("validate", folder, "--images", "1")
    assert done.returncode == 0 and "holds: " in done.stdout, done
