"""The integer network is the quantized network, to the last code."""

import copy
import pickle

import pytest
import torch
from torch import nn

from arq_env import ArqError
from arq_env.bitwidths import Bits, restrict, uniform
from arq_env.certification import certify
from arq_env.layers import find_layers
from arq_env.quantization import Quantizer, integer, integer_network, load_quantized, save_quantized
from arq_env.quantization.integer import IntegerConv2d, exact_pairs, integer_kernels, on_integers, weight_codes
from arq_env.quantization.quantizers import weight_range

pytestmark = pytest.mark.skipif(not integer_kernels(), reason="integer kernels need an x86 CPU with AVX2")


class Strided(nn.Module):
    """Convolutions of every geometry, signed and unsigned inputs, with and without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2, bias=False)
        self.signed = nn.Conv2d(8, 16, (1, 3), padding=(0, 1))
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        x = self.grouped(torch.relu(self.first(x - 0.5)))
        return self.last(torch.relu(self.signed(x)).mean((2, 3)))


def count(network) -> int:
    return sum(isinstance(module, IntegerConv2d) for module in network.modules())


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_same_function(bits):
    torch.manual_seed(bits)
    network = Strided().eval()
    images = torch.rand(40, 3, 9, 9)
    layers = find_layers(network, (3, 9, 9))
    quantized = Quantizer(network, layers, images).quantize(uniform(restrict(layers, {}), bits, bits))
    integer = integer_network(quantized)
    assert count(integer) == (3 if bits < 8 or exact_pairs() > 2**15 else 0)
    assert all(module.layer.largest_sum() < 2**24 for module in integer.modules() if isinstance(module, IntegerConv2d))
    with torch.inference_mode():
        for same in (integer, copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))):
            assert torch.equal(same(images), quantized(images))


@pytest.mark.parametrize(
    "groups, inputs, outputs, bits, there",
    [
        (1, 6, 10, 4, True),
        (8, 8, 8, 4, True),  # depthwise
        (2, 16, 8, 4, True),
        (2, 12, 20, 4, False),  # 6 and 10 channels a group: oneDNN's reference
        (8, 8, 16, 4, False),
        (1, 6, 10, 8, False),  # saturates without VNNI
    ],
)
def test_integers_where_they_are_exact_and_fast(groups, inputs, outputs, bits, there, monkeypatch):
    monkeypatch.setattr(integer, "exact_pairs", lambda: 2**15 - 1)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(inputs, outputs, 3, groups=groups), nn.Flatten(), nn.Linear(16 * outputs, 3)).eval()
    layers, images = find_layers(network, (inputs, 6, 6)), torch.rand(20, inputs, 6, 6)
    quantized = Quantizer(network, layers, images).quantize(uniform(restrict(layers, {}), bits, bits))
    converted = on_integers(copy.deepcopy(quantized))
    assert count(converted) == there
    with torch.inference_mode():
        assert torch.equal(converted(images), quantized(images))
        if there:
            assert count(integer_network(converted)) == 1 and torch.equal(integer_network(quantized)(images), quantized(images))


def test_another_cpu_does_not_saturate_in_silence(monkeypatch):
    monkeypatch.setattr(integer, "exact_pairs", lambda: 2**31 - 1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    layers, images = find_layers(network, (3, 8, 8)), torch.rand(20, 3, 8, 8)
    made = on_integers(Quantizer(network, layers, images).quantize(uniform(restrict(layers, {}), 8, 8)))
    kept = pickle.dumps(made)
    monkeypatch.setattr(integer, "exact_pairs", lambda: 2**15 - 1)
    with pytest.raises(ArqError, match="layer '0' saturates"):
        pickle.loads(kept)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_found_again(bits):
    generator = torch.Generator().manual_seed(bits)
    low, high, distance = weight_range(bits)
    codes = low + distance * torch.randint(0, (high - low) // distance + 1, (50, 4, 3, 3), generator=generator)
    codes[0], codes[1] = low, high
    steps = torch.rand(50, generator=generator) * 3 + 1e-4
    weight = codes * steps.view(-1, 1, 1, 1)
    found, found_steps = weight_codes(weight, bits)
    assert found.dtype == torch.int8 and found.abs().max() <= high
    torch.testing.assert_close(found * found_steps.view(-1, 1, 1, 1), weight)
    with pytest.raises(ArqError, match=f"more levels than {bits} bits"):
        weight_codes(weight + torch.rand(weight.shape, generator=generator), bits)


def test_certificates_of_a_finished_network(problem, tmp_path):
    quantizer = Quantizer(problem.network, problem.layers, problem.calibration_images())
    mixed = {layer.name: Bits(8 - i, 2 + i) for i, layer in enumerate(problem.layers)}
    save_quantized(quantizer.quantize(mixed), tmp_path / "network.safetensors", {"network": "toy"})
    network, _ = load_quantized(tmp_path / "network.safetensors", problem.network)
    images, labels = problem.test_images(1)
    plain, integer = (
        certify(net, images, labels, sigma=0.5, n0=20, n=200, log=tmp_path / name)
        for net, name in ((network, "plain.tsv"), (integer_network(network), "integer.tsv"))
    )
    assert (plain.radius == integer.radius).all() and (plain.prediction == integer.prediction).all()


def test_what_integers_cannot_do(problem, monkeypatch):
    with pytest.raises(ArqError, match="no quantized convolution"):
        integer_network(problem.network)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(256, 2)).eval()
    layers = find_layers(network, (3, 8, 8))
    quantized = Quantizer(network, layers, torch.rand(8, 3, 8, 8)).quantize(uniform(layers, 4, 4))
    with pytest.raises(ArqError, match="'0'.*reflect"):
        integer_network(quantized)
    with pytest.raises(ArqError, match="move the network to the CPU"):
        integer_network(quantized.to("meta"))
    monkeypatch.setattr(integer, "exact_pairs", lambda: -1)
    with pytest.raises(ArqError, match="AVX2"):
        integer_network(quantized)
