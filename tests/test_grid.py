"""Noise on a grid: what is drawn, what is certified by it, and networks that are functions of the grid's points."""

import functools
import tempfile
from pathlib import Path
from unittest import mock

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional

from arq_env import ArqError
from arq_env.bitwidths import Bits, uniform
from arq_env.certification import (
    ABSTAINED,
    GridNoise,
    Paired,
    Sequential,
    cache_predictions,
    certify,
    clopper_pearson_lower,
    smoothing_radius,
)
from arq_env.certification.grid import GridTable
from arq_env.layers import find_layers
from arq_env.quantization import Quantizer, integer_network
from arq_env.quantization.exact import ExactNetwork
from arq_env.quantization.integer import integer_kernels
from tests.toy import SHAPE, DepthwiseNet, depthwise_network, quantized_depthwise, toy_dataset, toy_network

SETTINGS = {"sigma": 0.5, "n0": 10, "n": 60, "alpha": 0.05}
IMAGES = toy_dataset().test.images.transpose(0, 3, 1, 2).astype(np.float32) / 255
LABELS = toy_dataset().test.labels


def brightest(images):
    """The colour with the highest mean, in float64: the same in any batch."""
    return images.astype(np.float64).sum((2, 3)).argmax(1)


class ReluDepthwise(DepthwiseNet):
    """The same layers with activations of one rounded operation a value."""

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images - 0.5)))
        x = functional.relu6(self.norm2(self.depthwise(x)))
        return self.last(torch.relu(self.pointwise(x)).mean((2, 3)))


def quantized(kind: str) -> nn.Module:
    """Of 8 bits by 8 at the ends, whose sums saturate in 16 bits, and of few bits between."""
    if kind == "plain":
        network: nn.Module = toy_network()
    else:
        network = ReluDepthwise()
        network.load_state_dict(depthwise_network().state_dict())
    layers = find_layers(network.eval(), SHAPE)
    first, *_, last = (layer.name for layer in layers)
    bits = uniform(layers, 4, 4) | {first: Bits(8, 8), last: Bits(8, 8)}
    return Quantizer(network, layers, torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))).quantize(bits)


def probabilities(table: GridTable) -> list[int]:
    """Of -reach, ..., reach as drawn, in 2^-64."""
    edges = [0, *map(int, table.thresholds), 2**64]
    return [high - low for low, high in zip(edges, edges[1:], strict=False)]


@pytest.mark.parametrize("steps, sigma", [(1, 1.5 / 255), (3, 0.004)])
def test_the_distribution_is_exact_up_to_its_error(steps, sigma):
    """Against integrals of the density, which share nothing with the table."""
    table = GridNoise(steps).table(sigma)
    with mpmath.workprec(150):
        step = 1 / (255 * steps * mpmath.mpf(sigma))
        ends = [(k - mpmath.mpf(1) / 2) * step for k in range(-table.reach, table.reach + 2)]
        exact = [mpmath.quad(mpmath.npdf, pair) for pair in zip(ends, ends[1:], strict=False)]
        drawn = [mpmath.mpf(count) / 2**64 for count in probabilities(table)]
        away = (sum(abs(p - q) for p, q in zip(exact, drawn, strict=True)) + 1 - sum(exact)) / 2
    assert 0 < away <= table.error < 1e-17


@pytest.mark.parametrize("sigma", [1e-6, 0.01, 0.25, 1.0])
def test_draws_are_the_inverse_of_the_table(sigma):
    """Also on either side of every threshold, and of every entry of the first level."""
    table = GridNoise().table(sigma)
    edges = np.concatenate([table.thresholds, np.arange(2**16, dtype=np.uint64) << np.uint64(48)])
    bits = np.concatenate([edges, edges - np.uint64(1)])
    generator = mock.Mock(integers=lambda low, high, size, dtype: bits.reshape(size))
    expected = np.searchsorted(table.thresholds, bits, side="right") - table.reach
    assert np.array_equal(table.draw(generator, (len(bits) // 2, 2)).ravel(), expected)
    assert expected.min() == -table.reach and expected.max() == table.reach


@pytest.mark.parametrize("steps, sigma", [(1, 0.004), (1, 0.5), (4, 0.25)])
def test_draws_are_gaussian(steps, sigma):
    drawn = GridNoise(steps).table(sigma).draw(np.random.default_rng(1), 200_000)
    scale = sigma * 255 * steps
    edges = np.unique(np.round(np.linspace(-2.5, 2.5, 40) * scale)) + 0.5
    counts = np.histogram(drawn, [-np.inf, *edges, np.inf])[0]
    expected = np.diff(stats.norm.cdf([-np.inf, *edges / scale, np.inf])) * len(drawn)
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_the_classifier_sees_points_of_the_grid():
    seen = []
    certify(lambda batch: seen.append(batch) or brightest(batch), IMAGES[:3], LABELS[:3], noise=GridNoise(5), **SETTINGS)
    inputs = np.concatenate(seen)
    codes = np.rint(inputs.astype(np.float64) * 1_275)
    assert inputs.dtype == np.float32 and np.array_equal(inputs, codes.astype(np.float32) / np.float32(1_275))
    assert (codes % 5).any() and inputs.min() < -0.5 and inputs.max() > 1.5
    noise = inputs - IMAGES[:3].mean()
    assert abs(noise.std() - 0.5) < 0.03


@pytest.mark.parametrize("method", ["cohen", "randomized", "sequential", Sequential(radius=0.2)])
def test_neither_batches_nor_threads_change_a_certificate(method, tmp_path):
    def table(**more):
        found = certify(brightest, IMAGES, LABELS, noise=GridNoise(), method=method, **SETTINGS, **more)
        return found.prediction.tolist(), found.radius.tolist()

    expected = table()
    assert (np.array(expected[1]) > 0).sum() > 20
    for batch_size in (1, 7, 1_000):
        assert table(batch_size=batch_size) == expected


def test_failures_stay_under_alpha():
    """One pixel and a threshold: the smoothed classifier and its radius are known exactly, for real x."""
    sigma, alpha, image = 3 / 255, 0.05, np.full((1, 1), 100 / 255, np.float32)
    # 1 from the code 98 on, so that with x + e rounded the boundary of the smoothed classifier is at 97.5 / 255
    truth = 2.5 / 255
    failures = 0
    for seed in range(600):
        found = certify(
            lambda batch: (np.rint(batch[:, 0] * 255) >= 98).astype(int),
            image,
            [1],
            sigma=sigma,
            n0=1,
            n=100,
            alpha=alpha,
            seed=seed,
            noise=GridNoise(),
        )
        failures += int(found.radius[0] > (truth if found.prediction[0] == 1 else 0))
    assert failures > 0 and stats.binom.sf(failures - 1, 600, alpha) > 1e-3, failures


def test_what_draws_are_away_from_exact_is_taken_off(monkeypatch):
    monkeypatch.setattr(GridTable, "error", 1e-4)
    found = certify(lambda batch: np.zeros(len(batch), int), IMAGES[:1], [0], noise=GridNoise(), **SETTINGS)
    lower = clopper_pearson_lower(60, 60, 0.05) - 1e-4 * IMAGES[0].size
    assert found.radius[0] == smoothing_radius(0.5, lower) and found.prediction[0] != ABSTAINED


def test_a_log_belongs_to_its_noise(tmp_path):
    def run(noise, images=IMAGES, log=tmp_path / "a.tsv"):
        return certify(brightest, images, LABELS, noise=noise, log=log, name="brightest", **SETTINGS)

    whole = run(GridNoise())
    kept = (tmp_path / "a.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "a.tsv").write_text("".join(kept[:20]))
    assert np.array_equal(run(GridNoise()).radius, whole.radius)
    # pixels that are k / 255 up to rounding are k / 255
    assert np.array_equal(run(GridNoise(), IMAGES * np.float32(1 + 2e-7)).radius, whole.radius)
    for other in (None, GridNoise(2)):
        with pytest.raises(ArqError, match="grid"):
            run(other)


def test_refused():
    def refused(match, images=IMAGES, **changes):
        with pytest.raises(ArqError, match=match) as error:
            certify(brightest, images, LABELS, **SETTINGS | {"noise": GridNoise()} | changes)
        assert "\n" not in str(error.value)

    refused("no k / 255", IMAGES * 0.99)
    refused("give a GridNoise", noise=1)
    refused("fewer steps", sigma=1e5)
    cache = cache_predictions(brightest, IMAGES, sigma=0.5, n0=10, n=60)
    refused("cache", method=Paired(cache, gamma=1))
    for steps in (0, 257, 1.5, "1"):
        with pytest.raises(ArqError, match="steps"):
            GridNoise(steps)


def test_networks_that_are_exact():
    network = quantized("depthwise")
    exact, images = ExactNetwork(network, SHAPE), torch.from_numpy(IMAGES)
    with torch.inference_mode():
        together = exact(images)
        assert torch.equal(torch.cat([exact(image[None]) for image in images]), together)
    torch.testing.assert_close(together, network(images))
    with pytest.raises(ArqError, match="silu"):
        ExactNetwork(quantized_depthwise(), SHAPE)
    with pytest.raises(ArqError, match="multiplies in float32"):
        ExactNetwork(toy_network(), SHAPE)


@functools.cache
def file_of(kind: str) -> bytes:
    """The network as ONNX on integers."""
    from arq_env.export.onnx_export import save_onnx

    with tempfile.TemporaryDirectory() as folder:
        return save_onnx(quantized(kind), Path(folder) / "a.onnx", {}, input_shape=SHAPE, integers=True).data


def test_files_that_are_exact():
    onnx = pytest.importorskip("onnx")
    from arq_env.export.runtime import OnnxClassifier

    def changed(change):
        model = onnx.load_model_from_string(file_of("depthwise"))
        change(model.graph)
        return OnnxClassifier(model.SerializeToString())

    def first(graph, kind):
        return next(node for node in graph.node if node.op_type == kind)

    def mean_of_float32(graph):
        mean = first(graph, "ReduceMean")
        next(node for node in graph.node if node.output[0] == mean.input[0]).attribute[0].i = onnx.TensorProto.FLOAT

    def large_weights(graph):
        # as INT8 they saturate on a CPU without VNNI
        weight = next(tensor for tensor in graph.initializer if tensor.name == "stem.weight")
        assert weight.data_type == onnx.TensorProto.UINT8
        codes = onnx.numpy_helper.to_array(weight).astype(np.int16) - 128
        weight.CopyFrom(onnx.numpy_helper.from_array(codes.astype(np.int8), "stem.weight"))
        node = first(graph, "ConvInteger")
        del node.input[3]

    assert OnnxClassifier(file_of("depthwise")).exact
    assert not changed(mean_of_float32).exact

    def large_constant(graph):
        large_weights(graph)
        weight = next(tensor for tensor in graph.initializer if tensor.name == "stem.weight")
        graph.node.insert(0, onnx.helper.make_node("Constant", [], ["stem.weight"], value=weight))
        graph.initializer.remove(weight)

    assert not changed(large_weights).exact
    assert not changed(large_constant).exact
    assert not changed(lambda graph: setattr(first(graph, "Relu"), "op_type", "Sigmoid")).exact


@pytest.mark.parametrize("count", [400, pytest.param(500_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "depthwise"])
def test_no_logit_differs(kind, count):
    """Of a million noisy images in all: PyTorch in several batches and threads, integer kernels, the file on integers."""
    pytest.importorskip("onnx")
    from arq_env.export.runtime import OnnxClassifier

    file, exact = OnnxClassifier(file_of(kind)), ExactNetwork(quantized(kind), SHAPE)
    integers = integer_network(exact) if integer_kernels() else None
    table, generator = GridNoise().table(0.5), np.random.default_rng(0)
    compared, threads = 0, torch.get_num_threads()
    part = min(count, 10_000)

    def logits(classifier, size):
        return np.concatenate([np.asarray(classifier(batch)) for batch in images.split(size)])

    try:
        for start in range(0, count, part):
            pixels = np.resize(IMAGES, (part, *SHAPE))
            images = torch.from_numpy(table.noisy(pixels, table.draw(generator, pixels.shape)))
            with torch.inference_mode():
                torch.set_num_threads(1)
                expected = logits(exact, 1_000)
                others = [logits(file, 500), *([] if integers is None else [logits(integers, 500)])]
                torch.set_num_threads(2)
                others.append(logits(exact, part))
                if not start:
                    others += [logits(exact, 7), logits(file, 7)]
            assert all(np.array_equal(other, expected) for other in others)
            compared += len(expected)
    finally:
        torch.set_num_threads(threads)
    assert compared == count and len(np.unique(expected)) > part / 10  # they are not all alike
