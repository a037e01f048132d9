"""Packed files: small, bit for bit the network, and refused in one line when they are anything else."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

import arq_env
from arq_env import ArqError
from arq_env.bitwidths import Bits
from arq_env.certification import network_digest
from arq_env.export.packed import load_packed, save_packed
from arq_env.problem import load_problem
from arq_env.quantization import Quantizer, model_bytes
from tests.toy import DepthwiseNet, depthwise_network, quantized_depthwise, toy_network


@pytest.fixture
def path(tmp_path):
    save_packed(quantized_depthwise(), tmp_path / "network.arq.safetensors", {"sigma": 0.5})
    return tmp_path / "network.arq.safetensors"


@pytest.mark.parametrize("bits", [(2, 3, 4, 8), (5, 6, 7, 2)])
def test_the_network_comes_back_bit_for_bit(tmp_path, bits):
    network = quantized_depthwise(bits, (2, 3, 6, 7))
    save_packed(network, tmp_path / "a", {"sigma": 0.5, "digest": "of the source"})
    unpacked, card = load_packed(tmp_path / "a", DepthwiseNet())
    assert network_digest(unpacked) == network_digest(network)
    assert card["sigma"] == 0.5 and card["made_from"] == "of the source" and card["layers"]["stem"][0] == bits[0]
    images = torch.rand(8, 3, 8, 8)
    assert torch.equal(unpacked(images), network(images))


def test_a_channel_of_zeros_stays_one(tmp_path):
    """As weights have it that were quantized by the first version; no code of 2 bits is 0."""
    network = quantized_depthwise()
    network.stem.codes[3] = 0
    save_packed(network, tmp_path / "a", {})
    assert network_digest(load_packed(tmp_path / "a", DepthwiseNet())[0]) == network_digest(network)


def test_its_size_is_that_of_its_bits(tmp_path):
    problem = load_problem("resnet20", "signs")
    bit_widths = {layer.name: Bits(2, 3) for layer in problem.layers}
    network = Quantizer(problem.network, problem.layers, torch.rand(8, 3, 32, 32)).quantize(bit_widths)
    save_packed(network, tmp_path / "network.arq.safetensors", problem.card)
    size = (tmp_path / "network.arq.safetensors").stat().st_size
    assert model_bytes(network, problem.layers, bit_widths) < size < 1.02 * model_bytes(network, problem.layers, bit_widths)
    assert network_digest(arq_env.load(tmp_path / "network.arq.safetensors")) == network_digest(network)


def rewritten(path, change):
    """The file with its tensors and card changed by ``change(tensors, card)``, well formed."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors, card = load(path.read_bytes()), json.loads(metadata["card"])
    change(tensors, card)
    path.write_bytes(save(tensors, metadata | {"card": json.dumps(card)}))


def with_its_digest(change):
    """The change by somebody who also writes the digest of what he changed."""
    from arq_env.export.packed import _contents

    def both(tensors, card):
        change(tensors, card)
        card["contents"] = _contents({name: tensor.numpy() for name, tensor in tensors.items()})

    return both


def step_of(index, value):
    def change(tensors, card):
        tensors["float32"][index] = value

    return with_its_digest(change)


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda tensors, card: tensors["weights"].add_(1), "SHA-256"),
        (with_its_digest(lambda tensors, card: tensors["weights"].fill_(255)), "bits do not have"),
        (lambda tensors, card: tensors.update(weights=tensors["weights"][:-1]), "numbers of values"),
        (lambda tensors, card: tensors.update(more=torch.zeros(3)), "numbers of values"),
        (lambda tensors, card: tensors.pop("int64"), "numbers of values"),
        (lambda tensors, card: tensors.update(float32=tensors["float32"].int()), "other types"),
        (lambda tensors, card: card["layers"].update(stem=[9, 4, 0]), "bits"),
        (lambda tensors, card: card["layers"].update(stem=[4, 4, 7]), "least activation"),
        (lambda tensors, card: card["layers"].update(stem=[4, 4]), "cannot be loaded"),
        (lambda tensors, card: card["layers"].update(stem=[8, 8, 0]), "numbers of values"),
        (lambda tensors, card: card["layers"].update(norm=[4, 4, 0]), "none to quantize"),
        (lambda tensors, card: card["layers"].update(other=[4, 4, 0]), "cannot be loaded"),
        (lambda tensors, card: card["layers"].pop("last"), "another network"),
        (lambda tensors, card: card.update(structure="0" * 16), "another network"),
        (lambda tensors, card: card.update(zero_channels={"stem": [10**9]}), "cannot be loaded"),
        (lambda tensors, card: card.clear(), "cannot be loaded"),
        (step_of(0, float("nan")), "not finite and positive"),
        (step_of(0, 0.0), "not finite and positive"),
        (step_of(9, float("nan")), "norm.weight holds NaN"),
    ],
)
def test_other_content_is_refused(path, change, part):
    rewritten(path, change)
    with pytest.raises(ArqError, match=part) as refused:
        load_packed(path, depthwise_network())
    assert "\n" not in str(refused.value)


def test_damaged_files_are_refused(path, tmp_path):
    data = path.read_bytes()
    header = struct.pack("<Q", 10**15)  # a header larger than any memory
    for damaged in (b"", data[:7], data[:200], data[:-1], data + b"0", header + data[8:], b"\x80\x04\x95" + data):
        (tmp_path / "a.safetensors").write_bytes(damaged)
        for read in (lambda path: load_packed(path, depthwise_network()), lambda path: arq_env.load(path, depthwise_network())):
            with pytest.raises(ArqError) as refused:
                read(tmp_path / "a.safetensors")
            assert "\n" not in str(refused.value)
    with pytest.raises(ArqError, match="cannot be loaded"):
        load_packed(tmp_path / "none", depthwise_network())
    with pytest.raises(ArqError, match="cannot be loaded|another network"):
        load_packed(path, toy_network())
    with pytest.raises(ArqError, match="somebody's own"):
        load_packed(path)  # the card names none


def test_what_is_not_quantized_is_not_packed(tmp_path):
    with pytest.raises(ArqError, match="no quantized layer"):
        save_packed(toy_network(), tmp_path / "a", {})


def test_files_and_networks_of_the_package(tmp_path):
    """One function for a checkpoint, too, and a plain name for what is none."""
    shipped = load_problem("resnet20", "signs").network
    from arq_env.networks.checkpoints import SHIPPED

    assert network_digest(arq_env.load(SHIPPED / "resnet20-signs-sigma0.5-gaussian.safetensors")) == network_digest(shipped)
    for there, part in ((tmp_path, "cannot be loaded"), (tmp_path / "x.onnx", "cannot be loaded")):
        with pytest.raises(ArqError, match=part):
            arq_env.load(there)
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ArqError, match="cannot be loaded"):
        arq_env.load(tmp_path / "a.npy")
