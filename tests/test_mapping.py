"""The mapping as JSON, and the same network made of it by Brevitas."""

import copy
import json

import pytest
import torch
from torch import nn

pytest.importorskip("brevitas")

from arq_env import ArqError
from arq_env.export.mapping import brevitas_network, save_mapping
from arq_env.quantization.exact import ExactNorm
from tests.toy import SHAPE, DepthwiseNet, depthwise_network, quantized_depthwise, toy_network


def float_network(quantized: nn.Module) -> nn.Module:
    """The network before quantization, with the statistics that it has after it."""
    network = copy.deepcopy(depthwise_network())
    for name, module in quantized.named_modules():
        if isinstance(module, ExactNorm):
            network.get_submodule(name).load_state_dict(module.state_dict())
    return network


@pytest.mark.parametrize("activation_bits", [(8, 2, 5, 4), (3, 6, 2, 7)])
def test_brevitas_rounds_alike(tmp_path, activation_bits):
    quantized = quantized_depthwise((2, 3, 4, 8), activation_bits)
    document = save_mapping(quantized, tmp_path / "mapping.json", {"sigma": 0.5})
    assert document["layers"]["stem"]["weight"]["levels"] == [-3, -1, 1, 3] and document["sigma"] == 0.5
    rounded = brevitas_network(float_network(quantized), tmp_path / "mapping.json")
    for name in document["layers"]:
        torch.testing.assert_close(rounded.get_submodule(name).weight, quantized.get_submodule(name).weight)
    images = torch.rand(16, *SHAPE, generator=torch.Generator().manual_seed(1))
    apart = (rounded(images) - quantized(images)).abs().amax(1)
    assert apart.median() < 1e-5  # single values may be within rounding of two codes
    rounded.train()(images).sum().backward()
    assert rounded.stem.parametrizations.weight.original.grad.abs().sum() > 0


def changed(path, *place, to):
    document = json.loads(path.read_text())
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = to
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "place, to, part",
    [
        (("format",), "other", "not a mapping"),
        (("layers",), [], "not a mapping"),
        (("layers", "other"), {}, "'other'"),
        (("layers", "norm"), {}, "'norm'"),
        (("layers", "stem", "weight", "steps"), [1.0], "8 positive steps"),
        (("layers", "stem", "weight", "steps"), [0.0] * 8, "8 positive steps"),
        (("layers", "stem", "weight", "steps"), [float("nan")] * 8, "8 positive steps"),
        (("layers", "stem", "weight", "bits"), 5, "levels"),
        (("layers", "stem", "activation", "bits"), 3, "levels"),
        (("layers", "stem", "activation", "step"), "1", "8 positive steps"),
        (("layers", "stem"), None, "'stem'"),
    ],
)
def test_other_mappings_are_refused(tmp_path, place, to, part):
    path = tmp_path / "mapping.json"
    save_mapping(quantized_depthwise(), path, {})
    changed(path, *place, to=to)
    with pytest.raises(ArqError, match=part) as refused:
        brevitas_network(DepthwiseNet(), path)
    assert "\n" not in str(refused.value)


def test_no_mapping(tmp_path):
    (tmp_path / "a.json").write_text("[")
    for path in (tmp_path / "a.json", tmp_path / "none.json"):
        with pytest.raises(ArqError, match="not a mapping"):
            brevitas_network(toy_network(), path)
    save_mapping(quantized_depthwise(), tmp_path / "mapping.json", {})
    with pytest.raises(ArqError, match="does not fit layer 'stem'"):
        brevitas_network(toy_network(), tmp_path / "mapping.json")
