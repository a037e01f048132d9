import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div

from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.finetuning import finetune, finetuning_recipe, held_out_acr
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint
from arq_env.networks.training import Recipe
from arq_env.problem import load_problem
from arq_env.quantization import load_quantized, model_bytes, save_quantized
from tests.toy import toy_problem

RECIPE = finetuning_recipe(0.5, epochs=3, images=500, batch=50, optimizer="adamw", peak_rate=0.005)


@pytest.fixture
def evaluator():
    return Evaluator(toy_problem(), CertifierSettings(images=16, n0=4, n=16))


@pytest.fixture
def coarse(evaluator):
    return uniform(evaluator.problem.layers, 2, 2, end_bits=2)


def test_finetuning_wins_back_what_bits_cost(evaluator, coarse, tmp_path):
    before = divergence_from_fp32(evaluator.problem, evaluator.quantizer.quantize(coarse))
    network, records = finetune(evaluator, coarse, replace(RECIPE, epochs=8), tmp_path)
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
    whole, records = finetune(evaluator, coarse, RECIPE, tmp_path / "whole")

    def dying(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(evaluator, coarse, RECIPE, tmp_path / "cut", on_epoch=dying)
    resumed, again = finetune(evaluator, coarse, RECIPE, tmp_path / "cut")
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [record["loss"] for record in again] == [record["loss"] for record in records]
    with pytest.raises(ArqError, match="differs in recipe"):
        finetune(evaluator, coarse, replace(RECIPE, epochs=2), tmp_path / "cut")


def test_fp32_is_finetuned_by_the_same_recipe(evaluator, tmp_path):
    network, records = finetune(evaluator, None, RECIPE, tmp_path)
    assert records[-1]["held_out_acr"] > 0 and not any(hasattr(module, "weight_bits") for module in network.modules())
    assert not torch.equal(network.middle.weight, evaluator.problem.network.middle.weight)


@pytest.mark.parametrize("change", [{"distillation": -0.1}, {"distillation": 1.5}, {"images": -1}, {"optimizer": "adam"}])
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
