import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arq_env import ArqError
from arq_env.bitwidths import Bits, bops, bops_fraction, check_map, complete, load_map, restrict, save_map, uniform
from arq_env.budget import BopsBudget
from arq_env.layers import Layers, find_layers
from arq_env.networks.mobilenet import mobilenetv2
from arq_env.networks.resnet import resnet20, resnet32

LAYERS = find_layers(resnet20(), (3, 32, 32))


def test_resnet20():
    assert sum(layer.macs for layer in LAYERS) == 40_551_040
    assert len(LAYERS) == 20 and LAYERS[0].name == "conv" and LAYERS[-1].name == "fc"
    assert sum(p.numel() for p in resnet20().parameters()) == 269_722
    down = next(layer for layer in LAYERS if layer.name == "stage2.0.conv1")
    assert (down.in_channels, down.out_channels, down.kernel, down.stride, down.input_size) == (16, 32, 9, 2, 1024)
    assert down.macs == 16 * 16 * 32 * 16 * 9 and down.parameters == 16 * 32 * 9 and not down.depthwise


def test_the_other_networks_for_small_images():
    deeper = find_layers(resnet32().eval(), (3, 32, 32))
    assert len(deeper) == 32 and sum(layer.macs for layer in deeper) == 68_862_592
    assert sum(p.numel() for p in resnet32().parameters()) == 464_154
    network = mobilenetv2().eval()
    layers = find_layers(network, (3, 32, 32))
    assert len(layers) == 53 and sum(layer.macs for layer in layers) == 20_577_792
    assert sum(p.numel() for p in network.parameters()) == 700_490
    assert [layer.stride for layer in layers if layer.depthwise] == [1, 2, 1, 2, *[1] * 9, 2, *[1] * 3]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("bits, fraction", [(8, 0.0625), (4, 0.0161), (3, 0.0094), (2, 0.00455)])
def test_uniform_fractions(bits, fraction):
    assert bops_fraction(uniform(LAYERS, bits, bits), LAYERS) == pytest.approx(fraction, rel=0.01)


@given(st.floats(0.0046, 0.08), st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 12)), min_size=18, max_size=18))
def test_whatever_is_asked_for_fits(fraction, wishes):
    budget, chosen = BopsBudget(LAYERS, fraction), {}
    for layer, wish in zip(LAYERS[1:-1], wishes, strict=True):
        bits = chosen[layer.name] = budget.fit(Bits(*wish), chosen)
        assert min(bits) >= 2 and max(bits) <= 8
    assert bops_fraction(complete(chosen, LAYERS), LAYERS) <= fraction


def test_asking_for_an_even_share_gives_it():
    budget = BopsBudget(LAYERS, bops_fraction(uniform(LAYERS, 4, 4), LAYERS))
    assert budget.even_share({}) == pytest.approx(16, abs=1e-5)
    assert budget.fit(Bits(4, 4), {}) == (4, 4)
    assert budget.fit(Bits(9, 0), {}) == (8, 2)
    first = LAYERS[1]
    left = budget.limit - budget.least({}) + 4 * budget.macs_from[0] - first.macs * 8 * 4
    assert budget.even_share({first.name: Bits(8, 4)}) == pytest.approx(left / budget.macs_from[1])


class Projected(torch.nn.Module):
    """Two residual blocks with projection shortcuts, as in larger ResNets; the second projection is the last layer but one."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3)
        for block in (1, 2):
            self.add_module(f"conv{block}", torch.nn.Conv2d(4, 4, 1))
            self.add_module(f"shortcut{block}", torch.nn.Conv2d(4, 4, 1))
        self.fc = torch.nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (self.conv1(x).relu() + self.shortcut1(x)).relu_()
        x = (self.conv2(x) + self.shortcut2(x)).relu()
        return self.fc(x.mean((2, 3)))


TIED = find_layers(Projected(), (3, 8, 8))


def test_layers_that_read_one_tensor_are_tied():
    ties = {layer.name: layer.tied_to for layer in TIED}
    assert ties == {"stem": None, "conv1": None, "shortcut1": "conv1", "conv2": None, "shortcut2": "conv2", "fc": None}
    assert not any(layer.tied_to for layer in LAYERS)  # parameter-free shortcuts read nothing through a layer


@given(st.floats(0.041, 0.1), st.lists(st.tuples(st.integers(2, 8), st.integers(2, 8)), min_size=4, max_size=4))
def test_tied_layers_share_activation_bits_within_the_budget(fraction, wishes):
    budget, chosen = BopsBudget(TIED, fraction), {}
    for layer, wish in zip(TIED[1:-1], wishes, strict=True):
        chosen[layer.name] = budget.fit(Bits(*wish), chosen)
    bit_widths = complete(chosen, TIED)
    assert all(bit_widths[f"conv{b}"].activation == bit_widths[f"shortcut{b}"].activation for b in (1, 2))
    assert bit_widths | chosen == bit_widths and bops_fraction(bit_widths, TIED) <= fraction


def test_a_map_that_breaks_a_tie_names_the_layers(tmp_path):
    bit_widths = uniform(TIED, 4, 4) | {"shortcut2": Bits(4, 5)}
    save_map(tmp_path / "map.json", bit_widths, TIED, **HEADER)
    with pytest.raises(ArqError, match="'conv2' and 'shortcut2' read the same tensor"):
        load_map(tmp_path / "map.json", TIED)


def test_a_map_fits_the_budget_that_it_reports():
    """To the last bit operation, and no map that costs one more."""
    rng, fp32 = np.random.default_rng(0), 1024 * sum(layer.macs for layer in LAYERS)
    for _ in range(2_000):
        bits = rng.integers(2, 9, (len(LAYERS), 2))
        bit_widths = {layer.name: Bits(int(w), int(a)) for layer, (w, a) in zip(LAYERS, bits, strict=True)}
        fraction = bops_fraction(bit_widths, LAYERS)
        limit = BopsBudget(LAYERS, fraction).limit
        assert limit >= bops(bit_widths, LAYERS) and limit / fp32 <= fraction < (limit + 1) / fp32


@given(st.lists(st.integers(1, 10**7), min_size=1, max_size=6), st.integers(2, 8))
def test_the_least_reachable_budget_is_met(macs, ends):
    layers = Layers(replace(LAYERS[0], name=str(i), macs=number) for i, number in enumerate(macs))
    layers = restrict(layers, {"first": f"{ends}/{ends}", "last": f"{ends}/{ends}"}) if len(layers) > 2 else layers
    least = uniform(layers, 2, 2)
    budget = BopsBudget(layers, bops_fraction(least, layers))
    assert budget.least({}) <= budget.limit
    with pytest.raises(ArqError, match="least reachable is") as error:
        BopsBudget(layers, 0.99 * budget.value)
    BopsBudget(layers, float(str(error.value).split("least reachable is ")[1].split()[0]))


@pytest.mark.parametrize("bits", [4, (4,), [4, 4], None, "44"])
def test_a_map_of_other_things_than_pairs(bits):
    with pytest.raises(ArqError, match="'fc' has bits"):
        check_map(uniform(LAYERS, 4, 4) | {"fc": bits}, LAYERS)


@pytest.mark.parametrize("fraction", [0, -1, 1.5, True, float("nan"), "much", None])
def test_budget_out_of_range(fraction):
    with pytest.raises(ArqError, match="fraction"):
        BopsBudget(LAYERS, fraction)


def test_infeasible_budget_says_what_is_feasible():
    with pytest.raises(ArqError, match="least reachable is 0.004") as error:
        BopsBudget(LAYERS, 0.003)
    least = float(str(error.value).split("least reachable is ")[1].split()[0])
    BopsBudget(LAYERS, least)


HEADER = {
    "network": "resnet20",
    "dataset": "cifar10",
    "sigma": 0.5,
    "budget": 0.02,
    "metrics": {"acr": 0.5},
    "provenance": {"seed": 1},
}


def test_map_file_comes_back(tmp_path):
    path, bit_widths = tmp_path / "bit_widths.json", uniform(LAYERS, 3, 5)
    save_map(path, bit_widths, LAYERS, **HEADER)
    assert load_map(path, LAYERS)[0] == bit_widths
    document = json.loads(path.read_text())
    assert document["format"] == "arq-bit-widths" and document["version"] == 1
    keys = [
        "format",
        "version",
        "network",
        "dataset",
        "sigma",
        "budget",
        "bops_fraction",
        "layers",
        "metrics",
        "provenance",
    ]
    assert list(document) == keys
    assert document["layers"][1] == {
        "name": "stage1.0.conv1",
        "weight_bits": 3,
        "activation_bits": 5,
        "macs": LAYERS[1].macs,
        "parameters": LAYERS[1].parameters,
    }


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: d["layers"].pop(3), "leaves out layer 'stage1.1.conv1'"),
        (lambda d: d["layers"][2].update(weight_bits=9), "'stage1.0.conv2' has weight bits 9"),
        (lambda d: d["layers"][2].update(activation_bits=3.5), "'stage1.0.conv2' has activation bits 3.5"),
        (lambda d: d["layers"][2].update(activation_bits=True), "activation bits True"),
        (lambda d: d["layers"][2].pop("weight_bits"), "weight_bits"),
        (lambda d: d["layers"][0].update(name="conv0"), "conv0"),
        (lambda d: d.pop("format"), "not a bit-width map"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(layers=5), "not a bit-width map"),
    ],
)
def test_malformed_map_file(tmp_path, damage, message):
    path = tmp_path / "bit_widths.json"
    save_map(path, uniform(LAYERS, 3, 5), LAYERS, **HEADER)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ArqError, match=message):
        load_map(path, LAYERS)


def test_missing_and_truncated_map_file(tmp_path):
    with pytest.raises(ArqError, match="cannot be read"):
        load_map(tmp_path / "none.json", LAYERS)
    for text in ('{"format": "arq-bit', "[]", "\xff"):
        (tmp_path / "cut.json").write_text(text, encoding="latin-1")
        with pytest.raises(ArqError, match="not a bit-width map"):
            load_map(tmp_path / "cut.json", LAYERS)
