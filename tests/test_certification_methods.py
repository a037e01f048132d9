"""What the methods promise beside validity: the same numbers however they are run, fewer samples, refusals."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import time
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from arq_env import ArqError
from arq_env.certification import (
    ABSTAINED,
    Certificates,
    Cohen,
    Incremental,
    Method,
    Paired,
    PredictionCache,
    Randomized,
    Sequential,
    cache_predictions,
    certify,
    clopper_pearson_lower,
    estimate_seconds,
    randomized_clopper_pearson_lower,
)
from arq_env.certification.sampling import ESTIMATION
from arq_env.certification.sequential import planned_samples
from tests.test_certify import halfspace, table, true_radius

SETTINGS = {"sigma": 0.5, "n0": 30, "n": 400, "alpha": 0.01}
METHODS = ["cohen", "randomized", Cohen(skip_wrong=True), "sequential", Sequential(radius=0.3), Incremental, Paired]


def shifted(images):
    """A variant of ``halfspace`` with a slightly different hyperplane."""
    margin = images.reshape(len(images), -1).mean(1) - 0.502
    return np.stack([-margin, margin], axis=1)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return (rng.random((37, 3, 4, 4)) * 0.2 + np.linspace(0.2, 0.4, 37)[:, None, None, None]).astype(np.float32)


@pytest.fixture(scope="module")
def cache(images):
    return cache_predictions(halfspace, images, sigma=0.5, n0=30, n=1_000)


@pytest.fixture(params=METHODS, ids=lambda chosen: chosen.__name__ if isinstance(chosen, type) else str(chosen))
def arguments(request, cache):
    return SETTINGS | {"method": request.param(cache) if isinstance(request.param, type) else request.param}


def columns(certificates):
    return [getattr(certificates, name).tolist() for name in ("label", "prediction", "radius", "n")]


LABELS = np.arange(37) % 5 == 4  # most are class 0, some of these labels wrong


def test_radii_are_sound(images, arguments):
    got = certify(shifted, images, LABELS, **arguments | {"alpha": 1e-6})
    truth = np.maximum(0.502 - images.reshape(37, -1).mean(1), 0) * np.sqrt(48)
    sure = got.prediction == 0
    assert sure.sum() >= 10 and (got.radius[sure] <= truth[sure]).all()
    assert not got.radius[got.prediction == ABSTAINED].any()


def test_same_numbers_however_it_is_run(images, arguments):
    expected = certify(shifted, images, LABELS, **arguments)
    assert columns(certify(shifted, images, LABELS, batch_size=7, **arguments)) == columns(expected)
    assert columns(certify(shifted, torch.from_numpy(images), torch.as_tensor(LABELS), **arguments)) == columns(expected)
    order = np.random.default_rng(1).permutation(37)
    shuffled = certify(shifted, images[order], LABELS[order], **arguments)
    np.testing.assert_array_equal(shuffled.radius, expected.radius[order])
    np.testing.assert_array_equal(shuffled.n, expected.n[order])
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert columns(certify(shifted, images, LABELS, map=threads.map, **arguments)) == columns(expected)


@pytest.mark.slow
def test_same_numbers_from_processes(images, arguments):
    with multiprocessing.get_context("spawn").Pool(2) as processes:
        spread = certify(shifted, images, LABELS, map=processes.imap, **arguments)
    assert columns(spread) == columns(certify(shifted, images, LABELS, **arguments))


def test_killed_and_resumed(images, arguments, tmp_path):
    """A certification that dies is taken up where it stopped, also in the middle of a line."""
    log, calls = tmp_path / "log.tsv", []

    def dying(batch):
        calls.append(len(batch))
        if sum(calls) > 17 * (SETTINGS["n0"] + 1):  # at the latest in the second chunk
            raise KeyboardInterrupt
        return shifted(batch)

    expected = certify(shifted, images, LABELS, **arguments)
    first = certify(shifted, images, LABELS, log=log, name="shifted", **arguments)
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 38 and lines[0].startswith("idx\tlabel\tpredict\tradius\tcorrect\ttime\t")
    log.write_text("".join(lines[:9]) + lines[9][:5])
    with pytest.raises(KeyboardInterrupt):
        certify(dying, images, LABELS, log=log, name="shifted", **arguments)
    done = len(log.read_text().splitlines()) - 1
    assert done in (8, 24)
    asked = []

    def counting(batch):
        asked.append(len(batch))
        return shifted(batch)

    resumed = certify(counting, images, LABELS, log=log, name="shifted", **arguments)
    assert columns(resumed) == columns(first) == columns(expected)
    assert sum(asked) < sum(expected.n) + 37 * SETTINGS["n0"]
    asked.clear()
    assert columns(certify(counting, images, LABELS, log=log, name="shifted", **arguments)) == columns(expected) and not asked
    assert table(Certificates.from_tsv(log)) == table(expected)


def test_a_log_of_something_else_is_refused(images, tmp_path):
    log = tmp_path / "log.tsv"
    certify(halfspace, images[:2], [0, 0], log=log, name="halfspace", **SETTINGS)
    with pytest.raises(ArqError, match="another alpha"):
        certify(halfspace, images[:2], [0, 0], log=log, name="halfspace", **SETTINGS | {"alpha": 0.1})
    with pytest.raises(ArqError, match="another images"):
        certify(halfspace, images[1:3], [0, 0], log=log, name="halfspace", **SETTINGS)
    networks = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval() for _ in range(2)]
    certify(networks[0], images[:2], [0, 0], log=tmp_path / "network.tsv", **SETTINGS)
    with pytest.raises(ArqError, match="another classifier"):
        certify(networks[1], images[:2], [0, 0], log=tmp_path / "network.tsv", **SETTINGS)
    with pytest.raises(ArqError, match="another classifier"):
        certify(shifted, images[:2], [0, 0], log=log, name="shifted", **SETTINGS)
    with pytest.raises(ArqError, match="give name="):
        certify(shifted, images[:2], [0, 0], log=log, **SETTINGS)
    relu, tanh = (torch.nn.Sequential(*networks[0], kind()).eval() for kind in (torch.nn.ReLU, torch.nn.Tanh))
    certify(relu, images[:2], [0, 0], log=tmp_path / "relu.v1", **SETTINGS)
    certify(tanh, images[:2], [0, 0], log=tmp_path / "relu.v2", **SETTINGS)
    with pytest.raises(ArqError, match="another classifier"):  # the same weights, another function
        certify(tanh, images[:2], [0, 0], log=tmp_path / "relu.v1", **SETTINGS)
    log.write_text("nothing of the kind\n")
    with pytest.raises(ArqError, match="remove it"):
        certify(halfspace, images[:2], [0, 0], log=log, name="halfspace", **SETTINGS)


def test_randomized_records_its_draws(images, tmp_path):
    """The draws are read back from the log and explain the radii; the bound is never below Clopper-Pearson's."""
    log = tmp_path / "log.tsv"
    got = certify(halfspace, images, np.zeros(37), method="randomized", log=log, name="halfspace", **SETTINGS)
    plain = certify(halfspace, images, np.zeros(37), **SETTINGS)
    assert (got.radius >= plain.radius).all() and got.radius.sum() > plain.radius.sum()
    np.testing.assert_array_equal(Certificates.from_tsv(log).draw, got.draw)
    assert len(set(got.draw)) == 37 and got.draw.min() >= 0 and got.draw.max() <= 1
    counts = np.arange(401)
    bounds = randomized_clopper_pearson_lower(counts, 400, 1.0, 0.01)
    np.testing.assert_allclose(bounds, clopper_pearson_lower(counts, 400, 0.01), atol=1e-9)


@pytest.mark.parametrize("method", [Cohen, Randomized])
def test_skipping_what_is_wrong_changes_no_figure(images, method, tmp_path):
    asked = []

    def counting(batch):
        asked.append(len(batch))
        return shifted(batch)

    log = tmp_path / "log.tsv"
    whole = certify(shifted, images, LABELS, method=method(), **SETTINGS)
    skipped = certify(counting, images, LABELS, method=method(skip_wrong=True), log=log, name="shifted", **SETTINGS)
    wrong = whole.n != skipped.n
    assert wrong[LABELS].all() and not wrong[whole.correct].any()
    np.testing.assert_array_equal(skipped.certified_radius, whole.certified_radius)
    np.testing.assert_array_equal(skipped.correct, whole.correct)
    assert (skipped.prediction[wrong] == ABSTAINED).all() and not skipped.n[wrong].any()
    assert sum(asked) == 37 * SETTINGS["n0"] + (~wrong).sum() * SETTINGS["n"]
    with pytest.raises(ArqError, match="another skip_wrong"):
        certify(shifted, images, LABELS, method=method(), log=log, name="shifted", **SETTINGS)
    unknown = certify(shifted, images, np.full(37, -1), method=method(skip_wrong=True), **SETTINGS)
    np.testing.assert_array_equal(unknown.radius, whole.radius)


def test_sequential_spends_samples_where_they_pay(images):
    """Nothing on wrong images, little on hopeless ones, at most n on the others; ACR stays close."""
    settings = {"sigma": 0.5, "n0": 100, "n": 5_000, "alpha": 0.001}
    full = certify(halfspace, images, LABELS, **settings)
    got = certify(halfspace, images, LABELS, method="sequential", **settings)
    assert not got.n[LABELS].any() and (got.n <= 5_000).all()
    np.testing.assert_array_equal(np.isnan(got.draw), got.n == 0)  # a randomized bound, only where something was counted
    assert got.n.mean() < 0.3 * 5_000 and got.acr > 0.9 * full.acr
    dear = certify(halfspace, images, LABELS, method=Sequential(price=0.01), **settings)
    assert dear.n.sum() > got.n.sum() and dear.acr > got.acr
    plan = planned_samples(100, 5_000, 0.001, 0.3)
    assert not plan[:50].any() and plan[70] < plan[95] <= 5_000


def test_sequential_decides_a_radius(images):
    settings = {"sigma": 0.5, "n0": 100, "n": 10_000, "alpha": 0.001}
    got = certify(halfspace, images, np.zeros(37), method=Sequential(radius=0.5), **settings)
    truth = true_radius(images) * (images.mean((1, 2, 3)) < 0.5)
    decided = got.radius >= 0.5
    assert (decided == (got.prediction == 0)).all() and not decided[truth < 0.5].any()
    assert decided[truth > 0.6].all() and got.n.mean() < 2_000
    assert got.n[truth > 1.0].max() < 200


def test_replaying_an_unchanged_network_loses_only_the_disagreement_bound(images, cache):
    got = certify(halfspace, images, np.zeros(37), method=Incremental(cache, gamma=1.0), **SETTINGS)
    kept = clopper_pearson_lower(cache.counts, 1_000, 0.005) - (1 - 0.005 ** (1 / 400))
    assert (got.prediction == np.where(kept > 0.5, cache.classes, ABSTAINED)).all()


def test_cache_is_a_file_tied_to_what_made_it(images, cache, tmp_path):
    path = tmp_path / "cache.npz"
    made = cache_predictions(halfspace, images, sigma=0.5, n0=30, n=1_000, path=path, name="halfspace")

    def refusing(batch):
        raise AssertionError("the file holds the predictions")

    read = cache_predictions(refusing, images, sigma=0.5, n0=30, n=1_000, path=path, name="halfspace")
    for name in ("classes", "counts", "predictions"):
        np.testing.assert_array_equal(getattr(read, name), getattr(made, name))
        np.testing.assert_array_equal(getattr(read, name), getattr(cache, name))
    assert read.predictions.dtype == np.uint8
    for change, message in [({"sigma": 0.25}, "sigma"), ({"seed": 1}, "seed"), ({"n": 10}, "another n"), ({"n0": 3}, "n0")]:
        with pytest.raises(ArqError, match=message):
            cache_predictions(halfspace, images, path=path, name="halfspace", **{"sigma": 0.5, "n0": 30, "n": 1_000} | change)
    with pytest.raises(ArqError, match="other images"):
        cache_predictions(halfspace, images[:5], sigma=0.5, n0=30, n=1_000, path=path, name="halfspace")
    with pytest.raises(ArqError, match="another network"):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).eval()
        cache_predictions(network, images, sigma=0.5, n0=30, n=1_000, path=path)
    path.write_bytes(path.read_bytes()[:1_000])
    with pytest.raises(ArqError, match="not a prediction cache"):
        PredictionCache.load(path)


def test_another_cache_is_refused(images, cache):
    for change in ({"sigma": 0.25}, {"seed": 1}, {"n": 1_001}):
        with pytest.raises(ArqError, match="the cache was made with"):
            certify(halfspace, images, np.zeros(37), method=Paired(cache), **SETTINGS | change)
    with pytest.raises(ArqError, match="other images"):
        certify(halfspace, images * 0.5, np.zeros(37), method=Paired(cache), **SETTINGS)


@pytest.mark.slow
def test_memory_does_not_grow_with_n():
    image = np.full((1, 3, 32, 32), 0.5, np.float32)

    def peak(n):
        tracemalloc.start()
        certify(lambda batch: np.zeros(len(batch), int), image, [0], **SETTINGS | {"n": n})
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(5_000)  # what the first call leaves in caches is not the point
    assert peak(50_000) < 1.2 * peak(5_000)


def test_no_noise_is_used_twice(images):
    """What is counted did not select, plan or enter the cache; what is replayed is the cache's noise."""
    seen = []

    def recording(batch):
        seen.extend(copy.tobytes() for copy in batch)
        return halfspace(batch)

    kept = cache_predictions(recording, images[:5], sigma=0.5, n0=30, n=400)
    cached, few = set(seen), SETTINGS | {"n": 300}
    assert len(cached) == len(seen) == 5 * 430
    for method in (Cohen(), Randomized(), Sequential(), Sequential(radius=0.3)):
        seen.clear()
        certify(recording, images[:5], np.zeros(5), method=method, **few)
        assert len(set(seen)) == len(seen) > 5 * 30
    for method in (Incremental, Paired):
        for gamma, replayed in ((1.0, True), (0.5, False)):
            seen.clear()
            certify(recording, images[:5], np.zeros(5), method=method(kept, gamma), **few)
            assert len(set(seen)) == len(seen) == 5 * 300
            assert (cached >= set(seen)) if replayed else not cached & set(seen)


def test_an_unordered_map_changes_nothing(images, arguments, cache):
    def backwards(function, chunks):
        return [function(chunk) for chunk in chunks][::-1]

    assert columns(certify(shifted, images, LABELS, map=backwards, **arguments)) == columns(
        certify(shifted, images, LABELS, **arguments)
    )
    again = cache_predictions(halfspace, images, sigma=0.5, n0=30, n=1_000, map=backwards)
    assert again.digests == cache.digests and (again.predictions == cache.predictions).all()


def test_sequential_takes_images_without_labels(images):
    unknown = certify(halfspace, images, np.full(37, -1), method="sequential", **SETTINGS)
    assert (unknown.prediction == 0).sum() > 20 and unknown.clean_accuracy == 0 == unknown.certified_accuracy(0)


def test_estimate(images):
    calls = []

    def slow_at_first(batch):
        time.sleep(0.001 * len(batch) if calls else 1.0)
        calls.append(1)
        return halfspace(batch)

    assert 37 * 1.01 < estimate_seconds(slow_at_first, images, n0=10, n=1_000) < 2 * 37 * 1.01


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda cache: Cohen(skip_wrong=1), "skip_wrong is 1: give True or False"),
        (lambda cache: Sequential(radius=-0.1), "radius is -0.1: give one that is not negative"),
        (lambda cache: Sequential(price=0), "price is 0: give a positive number"),
        (lambda cache: Incremental(None), "cache is None: give what cache_predictions returns"),
        (lambda cache: Paired(cache, gamma=0.4), "gamma is 0.4: give a probability from 0.5 to 1"),
    ],
)
def test_options_are_checked_where_they_are_given(cache, make, message):
    with pytest.raises(ArqError, match=message):
        make(cache)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "sequential", "radius": 0.5}, r"give method=Sequential\(radius=...\)"),
        ({"skip_wrong": True}, r"method=Cohen\(skip_wrong=...\) or method=Randomized"),
        ({"cache": None}, r"Incremental\(cache=...\) or method=Paired"),
        ({"method": "paired"}, r"needs a cache: give method=Paired\(cache\)"),
        ({"method": "magic"}, "choose one of cohen, randomized, sequential"),
        ({"method": Cohen}, r"or give an object such as Sequential"),
    ],
)
def test_options_given_elsewhere_are_refused_with_what_to_write(images, arguments, message):
    with pytest.raises(ArqError, match=message):
        certify(halfspace, images, LABELS, **SETTINGS, **arguments)
    with pytest.raises(TypeError, match="unexpected keyword argument 'sigmas'"):
        certify(halfspace, images, LABELS, sigmas=1, **SETTINGS)


def test_logs_belong_to_what_they_always_did(images, cache, tmp_path):
    """Under the names and values of earlier versions, whose logs are gone on with."""
    digests = {"images", "labels", "classifier"}
    for method, expected in {
        "cohen": {"method": "cohen", "cache": None},
        Cohen(skip_wrong=True): {"method": "cohen", "cache": None, "skip_wrong": True},
        Randomized(): {"method": "randomized", "cache": None},
        Sequential(): {"method": "sequential", "cache": None, "radius": None, "price": 0.3},
        Paired(cache): {"method": "paired", "cache": hashlib.sha256(cache.predictions.tobytes()).hexdigest(), "gamma": 0.99},
    }.items():
        log = tmp_path / f"{method}"[:12]
        certify(halfspace, images, LABELS, method=method, log=log, name="halfspace", **SETTINGS)
        stored = json.loads(log.with_name(log.name + ".settings.json").read_text())
        assert {name: value for name, value in stored.items() if name not in digests} == SETTINGS | {"seed": 0} | expected


@dataclass(frozen=True)
class Hoeffding(Method):
    """A bound of one's own: one class, and nothing is registered."""

    share: float = 1.0
    name = "hoeffding"

    def bound(self, sampler, labels, request):
        selected, _ = sampler.select(request.n0)
        counted = sampler.count(ESTIMATION, request.n, selected) / request.n
        lower = np.maximum(counted - np.sqrt(np.log(1 / (self.share * request.alpha)) / (2 * request.n)), 0)
        return selected, lower, np.full(len(labels), request.n), np.full(len(labels), np.nan)

    def highest(self, request):
        return 1 - np.sqrt(np.log(1 / (self.share * request.alpha)) / (2 * request.n))


def test_a_bound_of_one_s_own(images, tmp_path):
    sharp = certify(halfspace, images, LABELS, **SETTINGS)
    log = tmp_path / "log.tsv"
    got = certify(halfspace, images, LABELS, method=Hoeffding(), log=log, name="halfspace", **SETTINGS)
    assert (got.radius <= sharp.radius).all() and 0.6 * sharp.acr < got.acr < sharp.acr
    with pytest.raises(ArqError, match="n of at least 10"):
        certify(halfspace, images, LABELS, method=Hoeffding(), **SETTINGS | {"n": 2})
    with pytest.raises(ArqError, match="another share"):
        certify(halfspace, images, LABELS, method=Hoeffding(0.5), log=log, name="halfspace", **SETTINGS)
    with pytest.raises(ArqError, match="another method"):
        certify(halfspace, images, LABELS, log=log, name="halfspace", **SETTINGS)
