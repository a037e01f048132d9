"""Whatever ``map`` is given: the same table, or one sentence."""

import concurrent.futures
import functools
import multiprocessing
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest

from arq_env import ArqError
from arq_env.certification import cache_predictions, certify
from tests.test_certify import halfspace, table

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
