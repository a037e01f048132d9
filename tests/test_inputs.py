"""Whatever the arguments: an ArqError of one line that names them, or a valid result."""

import contextlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arq_env import ArqError
from arq_env.certification import (
    Certificates,
    Cohen,
    Incremental,
    Paired,
    Randomized,
    Sequential,
    betting_lower,
    cache_predictions,
    certify,
    clopper_pearson_lower,
    clopper_pearson_upper,
    estimate_seconds,
    randomized_clopper_pearson_lower,
    smoothing_radius,
    soft_radius,
    softmax_entropy,
)
from tests.hostile import hostile
from tests.test_certify import halfspace

IMAGES = np.linspace(0.3, 0.6, 5, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)
ASK = {"sigma": 0.5, "n0": 4, "n": 12}


class Halfspace(nn.Module):
    def forward(self, images):
        margin = images.flatten(1).mean(1) - 0.5
        return torch.stack([-margin, margin], 1)


class Gives(Halfspace):
    """A network with whatever output."""

    def __init__(self, change):
        super().__init__()
        self.change = change
        self.eval()

    def forward(self, images):
        return self.change(super().forward(images))


NETWORK = Halfspace().eval()
CACHE = cache_predictions(halfspace, IMAGES, **ASK)
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.integers(-3, 40),
    st.floats(-2, 2),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e300, -1e300, 5e-324, 10**400, 10**5000, 1 + 2j, Fraction(1, 3), b"1", (), [1], {}]),
    st.sampled_from([np.float32(0.5), np.int8(7), np.array(8), np.array([8]), np.array("8"), np.array(1j), np.datetime64("2020")]),
    st.sampled_from([torch.tensor(9), torch.tensor([9]), torch.tensor(0.25), torch.empty((), device="meta"), object(), len, float]),
)
PIXELS = st.sampled_from(
    [
        IMAGES,
        IMAGES.astype(np.float64).tolist(),
        torch.from_numpy(IMAGES).bfloat16(),
        torch.from_numpy(IMAGES).half().requires_grad_(),
        torch.from_numpy(IMAGES).to("meta"),
        torch.from_numpy(IMAGES).to_sparse(),
        IMAGES > 0.4,
        (IMAGES * 255).astype(np.uint8),
        IMAGES * 255,
        IMAGES.astype(np.float64) * 1e300,
        IMAGES * np.nan,
        IMAGES * 1j,
        IMAGES[0, 0, 0, 0],
        IMAGES[:, 0, 0, 0],
        IMAGES[:0],
        IMAGES[:, :0],
        IMAGES[:, 0],
        IMAGES[::-1],
        np.broadcast_to(np.float32(0.5), IMAGES.shape),
        [[0.1], [0.1, 0.2]],
        IMAGES.astype(str),
    ]
)
LABELS = st.sampled_from(
    [np.zeros(5), [0, 1, 0, 1, -1], np.arange(5.0), torch.ones(5, dtype=torch.bfloat16), np.ones(5, np.uint64), np.full(5, 2**63)]
    + [np.full(5, value) for value in (-2, 0.5, np.nan, np.inf, 1e300, 1j, True, "0", None)]
    + [np.zeros((5, 1)), np.zeros(4), [], 0, [[0], [1, 2]]]
)


@contextlib.contextmanager
def one_line():
    """Let nothing out but an ArqError of one line."""
    said = "a valid result"
    try:
        yield
    except ArqError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 500


def some(arguments: dict) -> st.SearchStrategy:
    """Some of the arguments, wrong or not."""
    return st.dictionaries(st.sampled_from(sorted(arguments)), st.none(), min_size=1, max_size=2).flatmap(
        lambda chosen: st.fixed_dictionaries({name: arguments[name] for name in chosen})
    )


METHODS = {
    Cohen: {"skip_wrong": WRONG},
    Randomized: {"skip_wrong": WRONG},
    Sequential: {"radius": WRONG, "price": WRONG},
    Incremental: {"cache": WRONG | st.just(CACHE), "gamma": WRONG},
    Paired: {"cache": WRONG | st.just(CACHE), "gamma": WRONG},
}
METHOD = WRONG | st.sampled_from([*METHODS, "cohen", "sequential", "paired"])
SHARED = dict.fromkeys(("sigma", "n0", "n", "seed", "batch_size", "map", "progress", "name"), WRONG) | {"images": PIXELS | WRONG}
CERTIFY = SHARED | dict.fromkeys(("alpha", "radius", "log"), WRONG) | {"method": METHOD, "labels": LABELS | WRONG}


@hostile
@given(some(CERTIFY) | st.just({}), st.sampled_from([*METHODS]).flatmap(lambda kind: st.tuples(st.just(kind), some(METHODS[kind]))))
def test_certify(tmp_path_factory, wrong, chosen):
    kind, options = chosen
    if isinstance(wrong.get("log"), str):
        wrong |= {"log": tmp_path_factory.mktemp("log") / "log.tsv", "name": wrong["log"]}
    options = {"cache": CACHE} | options if "cache" in METHODS[kind] else options
    with one_line():
        wrong = {"method": kind(**options)} | wrong
        got = certify(**{"classifier": halfspace, "images": IMAGES, "labels": np.zeros(5)} | ASK | wrong)
        assert len(got) == 5 and np.isfinite(got.radius).all() and (got.radius >= 0).all() and (got.n <= 12 + 40).all()


@hostile
@given(some(SHARED))
def test_cache_predictions_and_estimate(wrong):
    with one_line():
        got = cache_predictions(**{"classifier": halfspace, "images": IMAGES} | ASK | wrong)
        assert got.predictions.shape[0] == 5 and (got.counts <= got.n).all()
    with one_line():
        few = {name: value for name, value in wrong.items() if name in ("images", "n0", "n", "batch_size")}
        assert estimate_seconds(**{"classifier": halfspace, "images": IMAGES, "n": 12} | few) > 0


@hostile
@given(
    some({"images": PIXELS | WRONG, "labels": LABELS | WRONG} | dict.fromkeys(("sigma", "n", "seed", "entropy", "network"), WRONG))
)
def test_soft_radius_and_entropy(wrong):
    arguments = {"network": NETWORK, "images": IMAGES, "labels": np.zeros(5, int), "sigma": 0.5, "n": 4} | wrong
    with one_line():
        got = soft_radius(**arguments)
        assert got.shape == (5,) and np.isfinite(got).all()
    with one_line():
        less = {name: value for name, value in arguments.items() if name not in ("labels", "entropy")}
        assert 0 <= softmax_entropy(**less) <= np.log(2) + 1e-6


ARRAYS = WRONG | st.sampled_from([np.arange(5), np.arange(4), torch.arange(5), [1, 2, 3], [[1], [2, 3]], np.array([0.5, np.nan])])


@hostile
@given(ARRAYS, ARRAYS, WRONG | st.just(0.01), ARRAYS, st.tuples(ARRAYS, ARRAYS) | WRONG)
def test_bounds(successes, n, alpha, draw, prior):
    for bound in (
        lambda: clopper_pearson_lower(successes, n, alpha),
        lambda: clopper_pearson_lower(successes, 50, alpha),
        lambda: clopper_pearson_upper(successes, 50, alpha),
        lambda: clopper_pearson_upper(3, n, 0.01),
        lambda: randomized_clopper_pearson_lower(successes, 50, draw, 0.01),
        lambda: betting_lower(successes, 50, alpha),
        lambda: betting_lower(3, 50, 0.01, prior),
    ):
        with one_line():
            got = bound()
            assert (got >= 0).all() and (got <= 1).all()
    with one_line():
        assert (smoothing_radius(alpha, draw) >= 0).all()


def test_images_are_taken_as_they_are():
    """Attached to a graph, of another type, outside of [0, 1] by rounding: the table of the float32 array."""
    expected = certify(halfspace, IMAGES, np.zeros(5), **ASK).radius.tolist()
    exact = torch.from_numpy(IMAGES).double()
    for same in (exact.clone().requires_grad_(), exact.numpy(), np.asfortranarray(IMAGES), IMAGES[::-1][::-1]):
        got = certify(lambda batch: halfspace(np.asarray(batch)), same, np.zeros(5), **ASK)
        assert got.radius.tolist() == expected
    white = np.full((1, 3, 4, 4), 1 + 1e-6)
    before = white.copy()
    certain = certify(halfspace, white, [1], **ASK)
    assert certain.radius == certify(halfspace, np.ones((1, 3, 4, 4)), [1], **ASK).radius and (white == before).all()
    with pytest.raises(ArqError, match="range from 1.00001001"):
        certify(halfspace, np.full((1, 3, 4, 4), 1.00001, np.float32), [1], **ASK)
    with pytest.raises(ArqError, match="images are uint8: give floating-point"):
        certify(halfspace, np.zeros((1, 3, 4, 4), np.uint8), [1], **ASK)


def test_whole_numbers_may_be_floats():
    assert certify(halfspace, IMAGES, np.zeros(5), sigma=0.5, n0=4.0, n=1e2, seed=np.float32(3)).n[0] == 100
    assert cache_predictions(halfspace, IMAGES, sigma=np.float64(0.5), n0=torch.tensor(4), n=1e2).n == 100
    for n in (100.7, 1e300, np.nan, "8", None, True, 10**5000):
        for call in (
            lambda n: certify(halfspace, IMAGES, np.zeros(5), sigma=0.5, n=n),
            lambda n: cache_predictions(halfspace, IMAGES, sigma=0.5, n=n),
        ):
            with pytest.raises(ArqError, match="n is .*: give a whole number"):
                call(n)
    with pytest.raises(ArqError, match="at most 10,000,000,000 predictions"):
        cache_predictions(halfspace, np.repeat(IMAGES, 3, axis=0), sigma=0.5, n=1e9)


@pytest.mark.parametrize(
    "change, least",
    [
        ({}, 10),
        ({"alpha": 0.05}, 5),
        ({"method": "randomized", "n": 1}, 2),
        ({"method": Sequential(radius=0.0)}, None),
        ({"method": Sequential(radius=0.5)}, None),
        ({"method": Paired}, 11),
    ],
)
def test_too_few_samples_for_alpha_are_refused_with_the_least(change, least):
    """An image that is always classified alike is certified from the least n on, and abstained on below."""

    def always(batch):
        return np.zeros(len(batch), int)

    ask = {"sigma": 0.5, "n0": 8, "n": 4} | change
    if ask.get("method") is Paired:
        ask["method"] = Paired(cache_predictions(always, IMAGES, sigma=0.5, n0=8, n=2_000), gamma=0.9)
    with pytest.raises(ArqError, match="give an n of at least") as caught:
        certify(always, IMAGES, np.zeros(5), **ask)
    found = int(str(caught.value).rsplit(" ", 1)[1])
    assert least in (None, found)
    certain = certify(always, IMAGES, np.zeros(5), **ask | {"n": found}).radius > 0
    # else where a small draw is needed, or 0 proved
    assert certain.all() or ask.get("method") in ("randomized", Sequential(radius=0.0))
    with pytest.raises(ArqError, match="at least"):
        certify(always, IMAGES, np.zeros(5), **ask | {"n": found - 1})


def test_what_no_number_of_samples_certifies_is_refused():
    with pytest.raises(ArqError, match="no n is enough"):
        certify(halfspace, IMAGES, np.zeros(5), method=Sequential(radius=1e6), **ASK)
    with pytest.raises(ArqError, match="no n is enough"):
        certify(halfspace, IMAGES, np.zeros(5), method=Paired(CACHE), **ASK | {"n": 4})
    with pytest.raises(ArqError, match="lower price"):
        certify(halfspace, IMAGES, np.zeros(5), method=Sequential(price=100), **ASK)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda logits: (logits, logits), "gave a tuple of 2 entries"),
        (lambda logits: {"logits": logits}, "gave a dict of 1 entries"),
        (lambda logits: None, "object"),
        (lambda logits: logits[:, :1], "two classes or more"),
        (lambda logits: logits * 1j, "complex"),
        (lambda logits: logits.to("meta"), "meta"),
        (lambda logits: logits[:, 0].requires_grad_() + torch.autograd.grad(logits.sum(), logits), "failed on a batch"),
        (lambda logits: nn.functional.linear(logits, torch.ones(2, 2).double()), "failed on a batch of shape"),
    ],
)
def test_outputs_that_are_no_logits(change, message):
    for call in (
        lambda: certify(Gives(change), IMAGES, np.zeros(5), **ASK),
        lambda: softmax_entropy(Gives(change), IMAGES, sigma=0.5, n=2),
    ):
        with pytest.raises(ArqError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_weights_of_another_type_are_said():
    for kind in (torch.float16, torch.float64, torch.bfloat16):
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 2).to(kind)).eval()
        with pytest.raises(ArqError, match=f"convert its {str(kind).removeprefix('torch.')} weights"):
            certify(network, IMAGES, np.zeros(5), **ASK)


def test_labels_too_large_to_count():
    with pytest.raises(ArqError, match="label 9223372036854775807"):
        certify(lambda batch: np.full(len(batch), 2**63 - 1), IMAGES, np.zeros(5), **ASK)
    assert isinstance(certify(lambda batch: np.full(len(batch), 2**31 - 1), IMAGES, np.zeros(5), **ASK), Certificates)
