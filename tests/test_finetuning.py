import json
from dataclasses import replace

import pytest
import torch
import torch.nn.utils.prune
from torch.nn.functional import kl_div

from arq_env import ArqError
from arq_env.bitwidths import restrict, uniform
from arq_env.datasets import Split
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.finishing import brief_recipe, finish, finish_briefly, held_out, held_out_acr
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint, load_weights, save_checkpoint
from arq_env.networks.recipe import finetuning_recipe
from arq_env.networks.training import Recipe
from arq_env.problem import load_problem
from arq_env.quantization import load_quantized, model_bytes, save_quantized
from tests.toy import ToyNet, toy_dataset, toy_network, toy_problem

RECIPE = finetuning_recipe(0.5, epochs=3, images=500, batch=50, optimizer="adamw", peak_rate=0.005)


@pytest.fixture
def evaluator():
    return Evaluator(toy_problem(), CertifierSettings(images=16, n0=4, n=16))


@pytest.fixture
def coarse(evaluator):
    return uniform(restrict(evaluator.problem.layers, {}), 2, 2)


def test_finetuning_wins_back_what_bits_cost(evaluator, coarse, tmp_path):
    before = divergence_from_fp32(evaluator.problem, evaluator.quantizer.quantize(coarse))
    network, records = finish(evaluator, coarse, replace(RECIPE, epochs=8), tmp_path)
    assert divergence_from_fp32(evaluator.problem, network) < 0.75 * before
    assert held_out_acr(evaluator, network) == records[-1]["held_out_acr"]
    assert [record["epoch"] for record in records] == list(range(1, 9)) and not network.training
    assert [network.get_submodule(name).weight_bits for name in coarse] == [2, 2, 2, 2]


@torch.inference_mode()
def divergence_from_fp32(problem, network) -> float:
    """Mean KL divergence in nats on noisy images that are not trained on: smooth in the weights, so the same on every CPU."""
    images, _ = problem.reward_images(64)
    noisy = images.repeat(16, 1, 1, 1)
    noisy += problem.sigma * torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    target = problem.network(noisy).log_softmax(1)
    return kl_div(network(noisy).log_softmax(1), target, reduction="batchmean", log_target=True).item()


def test_a_killed_finetuning_ends_the_same(evaluator, coarse, tmp_path):
    whole, records = finish(evaluator, coarse, RECIPE, tmp_path / "whole")

    def dying(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finish(evaluator, coarse, RECIPE, tmp_path / "cut", on_epoch=dying)
    resumed, again = finish(evaluator, coarse, RECIPE, tmp_path / "cut")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [record["loss"] for record in again] == [record["loss"] for record in records]
    with pytest.raises(ArqError, match="differs in recipe"):
        finish(evaluator, coarse, replace(RECIPE, epochs=2), tmp_path / "cut")


def test_a_state_belongs_to_what_was_trained(evaluator, coarse, tmp_path):
    """To the map above all: its weights and steps are another's."""
    short, problem = replace(RECIPE, epochs=1, images=50), evaluator.problem
    network, _ = finish(evaluator, coarse, short, tmp_path)
    again, _ = finish(Evaluator(problem, evaluator.settings), coarse, short, tmp_path)
    assert torch.equal(again.middle.weight, network.middle.weight)
    before = (tmp_path / "training.pt").read_bytes()
    other_data = replace(toy_dataset(), reward=Split(toy_dataset().reward.images[::-1], toy_dataset().reward.labels[::-1]))
    other_network = toy_network()
    other_network.middle.bias.data += 1
    for bit_widths, changes, what in (
        (uniform(problem.layers, 8, 8), {}, "map"),
        (None, {}, "map"),
        (coarse, {"load": lambda: other_data}, "data set"),
        (coarse, {"network": other_network}, "network"),
    ):
        with pytest.raises(ArqError, match=f"differs in {what}.: choose another --output"):
            finish(Evaluator(toy_problem(**changes), evaluator.settings), bit_widths, short, tmp_path)
    for change in ({"seed": 1}, {"calibration_images": 64}):
        with pytest.raises(ArqError, match="differs in evaluator"):
            finish(Evaluator(problem, replace(evaluator.settings, **change)), coarse, short, tmp_path)
    assert (tmp_path / "training.pt").read_bytes() == before


def test_held_out_images_are_ones_that_no_map_was_rewarded_on(evaluator, coarse, tmp_path):
    """Of 64 reward images; those that maps are confirmed on stay out as well where they can."""

    def chosen(**settings):
        count, first, unseen = held_out(Evaluator(evaluator.problem, CertifierSettings(**settings)))
        return (first, first + count) if unseen else "none"

    assert chosen(images=16) == (48, 64) and chosen(images=16, first=8) == (56, 64)
    assert chosen(images=22) == (22, 64) and chosen(images=60) == (60, 64)
    assert chosen(images=60, first=4) == (0, 4) and chosen(images=64) == "none"
    signs = Evaluator(load_problem("resnet20", "signs"), CertifierSettings(images=512, n=4))
    assert held_out(signs) == (464, 1536, True)  # as in the published figures


def test_brief_finetuning_of_few_images(evaluator, coarse):
    few = Split(*(array[:100] for array in toy_dataset().train))
    problem = toy_problem(load=lambda: replace(toy_dataset(), train=few))
    assert brief_recipe(problem, 3).batch == 100
    assert not finish_briefly(Evaluator(problem, evaluator.settings), coarse, 2).training


def test_fp32_is_finetuned_by_the_same_recipe(evaluator, tmp_path):
    network, records = finish(evaluator, None, RECIPE, tmp_path)
    assert records[-1]["held_out_acr"] > 0 and not any(hasattr(module, "weight_bits") for module in network.modules())
    assert not torch.equal(network.middle.weight, evaluator.problem.network.middle.weight)


@pytest.mark.parametrize(
    "change",
    [
        {"distillation": -0.1},
        {"distillation": 1.5},
        {"images": -1},
        {"optimizer": "adam"},
        {"precision": "fp16"},
        {"epochs": 2.5},
        {"batch": "50"},
        {"peak_rate": float("inf")},
        {"momentum": 1.0},
        {"seed": None},
    ],
)
def test_recipe_out_of_range(change):
    with pytest.raises(ArqError, match=next(iter(change))):
        Recipe(**change)


def test_quantized_network_comes_back(evaluator, tmp_path):
    bit_widths = uniform(evaluator.problem.layers, 3, 5)
    network = evaluator.quantizer.quantize(bit_widths)
    path = tmp_path / "network.safetensors"
    save_quantized(network, path, {"network": "toy"})
    loaded, card = load_quantized(path, evaluator.problem.network)
    images = evaluator.problem.calibration_images()[:8]
    assert torch.equal(loaded(images), network(images)) and card["layers"][1]["activation_bits"] == 5
    with pytest.raises(ArqError, match="no network 'toy'"):
        load_quantized(path)
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps(card | {"layers": card["layers"][:1] + [card["layers"][1] | {"name": "elsewhere"}]}))
    with pytest.raises(ArqError, match="elsewhere"):
        load_quantized(path, evaluator.problem.network)
    card_path.write_text(json.dumps(card))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ArqError, match="damaged"):
        load_quantized(path, evaluator.problem.network)
    with pytest.raises(ArqError, match="cannot be loaded"):
        load_quantized(tmp_path / "none.safetensors")


def test_model_bytes():
    problem = load_problem("resnet20", "signs")
    network, _ = load_checkpoint(Checkpoint("resnet20", "signs", 0.5))
    floats = sum(t.numel() for t in network.state_dict().values() if t.is_floating_point())
    assert model_bytes(network, problem.layers, None) == 4 * floats
    packed = sum(layer.parameters for layer in problem.layers) // 2
    ends = (problem.layers[0].parameters + problem.layers[-1].parameters) // 2
    steps = 4 * sum(layer.out_channels + 1 for layer in problem.layers)
    weights = sum(layer.parameters for layer in problem.layers)
    assert model_bytes(network, problem.layers, uniform(problem.layers, 4, 4)) == 4 * (floats - weights) + packed + ends + steps


def test_files_of_two_networks_never_share_a_card(evaluator, tmp_path):
    networks = {f"net-sigma0.{end}": evaluator.quantizer.quantize(uniform(evaluator.problem.layers, end, end)) for end in (2, 5)}
    for name, network in networks.items():
        save_quantized(network, str(tmp_path / name), {"network": "toy"})  # a path may be a str
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"net-sigma0.{end}{json}" for end in (2, 5) for json in ("", ".json")
    ]
    for name, network in networks.items():
        loaded, _ = load_quantized(str(tmp_path / name), evaluator.problem.network)
        assert torch.equal(loaded.middle.weight, network.middle.weight)


class Versioned(torch.nn.Module):
    """As torchvision's MNASNet: it refuses a state that does not say its version; and one module has two names."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.body = self.alias = ToyNet()

    def forward(self, images):
        return self.body(images)

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        assert metadata.get("version") == 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_states_with_versions_and_tensors_with_two_names(tmp_path):
    torch.manual_seed(0)
    network = Versioned().eval()
    save_checkpoint(network, str(tmp_path / "a.safetensors"), {})
    other = Versioned().eval()
    load_weights(other, str(tmp_path / "a.safetensors"))
    assert torch.equal(other.alias.middle.weight, network.body.middle.weight)
    with pytest.raises(ArqError, match="extra_state.*no tensor"):
        save_checkpoint(Stateful(), tmp_path / "b.safetensors", {})


class Stateful(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def get_extra_state(self):
        return {"a": 1}


@pytest.mark.parametrize(
    "wrap",
    [
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
def test_model_bytes_count_what_is_shipped(evaluator, wrap):
    """Weights and bias of a layer; not what a parametrization or a mask keeps beside them."""
    plain, wrapped = toy_network(), toy_network()
    wrap(wrapped.middle)
    layers = evaluator.problem.layers
    for bit_widths in (None, uniform(layers, 4, 4)):
        assert model_bytes(wrapped, layers, bit_widths) == model_bytes(plain, layers, bit_widths)
    plain.alias = plain.norm
    assert model_bytes(plain, layers, None) == model_bytes(toy_network(), layers, None)
    learnable = evaluator.quantizer.learnable(uniform(layers, 4, 4))
    assert model_bytes(learnable, layers, uniform(layers, 4, 4)) == model_bytes(toy_network(), layers, uniform(layers, 4, 4))
