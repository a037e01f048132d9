"""Whatever ``map`` is given, and whatever engine runs it: the same table, or one sentence."""

import concurrent.futures
import functools
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.certification import cache_predictions, certify
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.support import engines
from arq_env.support.engines import engine, workers
from tests.test_certify import halfspace, table
from tests.toy import make_toy_env, outcome, search_toy, toy_network, toy_problem

IMAGES = np.linspace(0.3, 0.45, 40, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)
ASK = {"sigma": 0.5, "n0": 8, "n": 32}
CALLS = [
    functools.partial(certify, halfspace, IMAGES, np.zeros(40), **ASK),
    functools.partial(cache_predictions, halfspace, IMAGES, **ASK),
]


def results(function, chunks):
    return [function(chunk) for chunk in chunks]


@pytest.mark.parametrize("call", CALLS, ids=["certify", "cache_predictions"])
@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda f, c: None, "map or progress gave None"),
        (lambda f, c: 3, "gave 3"),
        (lambda f, c: "abc", "gave 'a'"),
        (lambda f, c: results(f, c)[:-1], "no result for 8 of 40 images, the first of them 32"),
        (lambda f, c: results(f, c)[1:], "no result for 16 of 40 images, the first of them 0"),
        (lambda f, c: [], "no result for 40"),
        (lambda f, c: 2 * results(f, c), "image 0 twice"),
        (lambda f, c: [f(c[0]) for _ in c], "image 0 twice"),
        (lambda f, c: [None for _ in c], "gave None where"),
        (lambda f, c: [concurrent.futures.Future() for _ in c], "Future"),
        (lambda f, c: [done.result for done in results(f, c)], "where a task's result was due"),
        (lambda f, c: results(f, [(rows[::-1], *rest) for rows, *rest in c]), "twice|no result"),
        (3, "map is 3: give a function"),
        (len, r"called as map\(task, chunks\)"),
        (None, "map is None"),
    ],
)
def test_a_map_that_is_none(call, wrong, message):
    with pytest.raises(ArqError, match=message):
        call(map=wrong)


@pytest.mark.parametrize("wrong", [lambda chunks, total: None, lambda chunks, total: list(chunks)[1:], "bar"])
def test_a_progress_that_loses_results(wrong):
    for call in CALLS:
        with pytest.raises(ArqError, match="progress"):
            call(progress=wrong)


def test_engines_that_take_no_iterator(tmp_path):
    """As Dask's; and one that slices what it is given. The built-in map stays lazy, so that the log grows."""

    def picky(function, chunks):
        assert not isinstance(chunks, Iterator) and len(chunks) == len(list(chunks)) == 3
        return [done for start in range(0, len(chunks), 2) for done in results(function, chunks[start : start + 2])]

    expected, cache = (call() for call in CALLS)
    assert table(CALLS[0](map=picky)) == table(expected)
    assert (CALLS[1](map=picky).predictions == cache.predictions).all()
    log, lengths = tmp_path / "log.tsv", []

    def watching(batch):
        lengths.append(len(log.read_text().splitlines()))
        return halfspace(batch)

    certify(watching, IMAGES, np.zeros(40), log=log, name="halfspace", **ASK)
    assert sorted(set(lengths)) == [1, 17, 33]


def dying(batch):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_lambda_and_a_death_in_a_process_pool():
    unsendable = lambda batch: halfspace(batch)  # noqa: E731
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        with pytest.raises(ArqError, match="cannot be sent .*a function that a module defines") as caught:
            certify(unsendable, IMAGES, np.zeros(40), map=pool.map, **ASK)
        assert "\n" not in str(caught.value) and caught.value.__suppress_context__
        assert table(certify(halfspace, IMAGES, np.zeros(40), map=pool.map, **ASK)) == table(CALLS[0]())
        with pytest.raises(ArqError, match="a worker process ended"):
            certify(dying, IMAGES, np.zeros(40), map=pool.map, **ASK)


def test_a_classifier_s_own_mistakes_stay_what_they_are():
    def broken(batch):
        raise TypeError("unsupported operand")

    with pytest.raises(TypeError, match="unsupported operand"):
        certify(broken, IMAGES, np.zeros(40), **ASK)


class Held:
    """Tells the process that it was unpickled in, at each call, and how often it was unpickled there."""

    unpickled = 0

    def __setstate__(self, state):
        Held.unpickled += 1

    def __getstate__(self):
        return {"weights": b"0" * 100_000}

    def __call__(self, number):
        time.sleep(0.05)
        return os.getpid(), Held.unpickled, torch.get_num_threads(), number


@pytest.mark.slow
def test_worker_processes_change_nothing():
    """Certificates, evaluations of many maps and of one in parts; a function goes to each worker once."""
    maps = [uniform(make_toy_env().layers, bits, 4) for bits in (2, 3, 4)]
    settings = CertifierSettings(images=200, n=2, part="train")
    here = Evaluator(toy_problem(), settings)
    network, images = toy_network(), torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    call = functools.partial(certify, network, images, np.zeros(40), sigma=0.5, n=200)
    with engine("serial"):
        expected = [(e.acr, e.clean_accuracy, e.certified_accuracy) for e in here.evaluate_many(maps)], table(call())
    there = Evaluator(toy_problem(), settings)
    with engine("processes:2") as there.engine:
        assert there.engine.workers == 2 and torch.get_num_threads() == 1
        found = [there.evaluate(maps[0]), *there.evaluate_many(maps)[1:]]
        assert [(e.acr, e.clean_accuracy, e.certified_accuracy) for e in found] == expected[0]
        assert there.evaluate_many(maps) == found  # recalled
        assert table(call(map=there.engine.map)) == expected[1]
        told = list(there.engine.map(Held(), range(8)))
        assert [number for *_, number in told] == list(range(8)) and {row[1:3] for row in told} == {(1, 1)}
        folder = there.engine._shared[next(iter(there.engine._shared))].parent
        assert folder.is_dir()
    assert not folder.exists()
    assert pickle.loads(pickle.dumps(there)).engine.workers == 1


@pytest.mark.slow
def test_sensitivities_are_the_same_in_worker_processes():
    env, alone = make_toy_env(), make_toy_env()
    with engine("processes:2") as env.evaluator.engine:
        assert env.evaluator.rounding == "exact" and env.sensitivities == alone.sensitivities


def test_a_search_in_worker_processes_leaves_the_same_trace(tmp_path, monkeypatch):
    """The workers are told from one here: what is asked of them, in which order, is the search's."""
    asked, env = [], make_toy_env()
    monkeypatch.setattr(engines.Engine, "workers", 4)
    monkeypatch.setattr(env.evaluator.engine, "map", lambda f, tasks: (asked.append(len(tasks)), map(f, tasks))[1])
    best = search_toy(tmp_path / "beside", "random", 10, env)
    monkeypatch.undo()
    # the first calls are the search's, four maps at a time; those after confirm
    assert asked[0] == 4 and sum(asked[:2]) == read_trace(tmp_path / "beside" / "trace.jsonl")[-1].evaluations
    assert search_toy(tmp_path / "serial", "random", 10).reward == best.reward
    assert len(outcome(tmp_path / "beside")) == 10 and outcome(tmp_path / "beside") == outcome(tmp_path / "serial")


@pytest.mark.parametrize(
    "asked, part",
    [
        ("pool", "choose of serial, processes"),
        ("serial:2", "no engine 'serial:2'"),
        ("", "no engine ''"),
        ("processes:0", "whole number from 1"),
        ("processes:two", "'two' processes"),
        ("dask:127.0.0.1:1", "no Dask scheduler answers at 127.0.0.1:1"),
        ("dask:nonsense", "no Dask scheduler answers at nonsense"),
        ("ray:127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("ray:nonsense", "no Ray cluster answers at nonsense"),
    ],
)
def test_engines_that_are_not_there(asked, part, monkeypatch):
    monkeypatch.setattr(engines, "PATIENCE", 0.5)
    if asked.startswith(("dask", "ray")):
        pytest.importorskip({"d": "distributed", "r": "ray"}[asked[0]])
    threads = torch.get_num_threads()
    with pytest.raises(ArqError, match=part), engine(asked):
        pass
    assert torch.get_num_threads() == threads


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(ArqError, match=r"the engine 'dask' needs distributed .*\[dask\]"), engine("dask"):
        pass


def die_once(path: Path, number: int) -> int:
    """The number's square; the first call that finds no such file makes it and ends its process."""
    if number == 3 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def fail(number):
    raise ArqError(f"no {number}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dask", "ray"])
def test_clusters_change_nothing(name, tmp_path):
    """As in one process, also after a worker was killed; an error is the one that was raised."""
    evaluators = [Evaluator(toy_problem(), CertifierSettings(images=200, n=2, part="train")) for _ in range(2)]
    maps = [uniform(make_toy_env().layers, bits, 4) for bits in (2, 3, 4)]
    torch.set_num_threads(2)
    try:
        with pytest.raises(ArqError, match="^no 5$"), engine(name) as evaluators[1].engine:
            there = evaluators[1].engine
            assert there.workers == 2
            assert [table(call(map=there.map)) for call in CALLS[:1]] == [table(CALLS[0]())]
            found = [[e.acr for e in evaluator.evaluate_many(maps)] for evaluator in evaluators]
            assert found[0] == found[1]
            assert list(there.map(functools.partial(die_once, tmp_path / "killed"), range(8))) == [n**2 for n in range(8)]
            assert (tmp_path / "killed").exists() and there.submit(pow, 2, 5).result() == 32
            assert {row[1:3] for row in there.map(Held(), range(4))} == {(1, 1)}
            there.submit(fail, 5).result()
    finally:
        torch.set_num_threads(1)


def test_a_killed_worker_ends_the_command():
    with pytest.raises(ArqError, match="a worker process was killed"), workers(1) as pool:
        pool.submit(signal.raise_signal, signal.SIGKILL).result()


def test_an_error_ends_the_workers_at_once():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), workers(1) as pool:
        pool.submit(abs, -1).result()
        task = pool.submit(time.sleep, 600)
        while not task.running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert isinstance(task.exception(), BrokenProcessPool) and time.monotonic() - start < 300
