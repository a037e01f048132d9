import copy

import pytest
import torch
from torch import nn

from arq_env import ArqError
from arq_env.bitwidths import Bits, uniform
from arq_env.layers import find_layers
from arq_env.quantization import Quantizer
from arq_env.quantization.calibrate import reestimate_batch_norm
from arq_env.quantization.modules import (
    LearnableLayer,
    QuantizedLayer,
    learned_rounding,
)
from tests.test_layers_and_budget import Projected
from tests.toy import SHAPE


@pytest.fixture
def quantizer(problem):
    return Quantizer(problem.network, problem.layers, problem.calibration_images())


def test_layers_are_converted_by_name(quantizer, problem):
    bit_widths = uniform(problem.layers, 3, 5)
    network = quantizer.quantize(bit_widths)
    for layer in problem.layers:
        module = network.get_submodule(layer.name)
        assert isinstance(module, QuantizedLayer)
        assert (module.weight_bits, module.activation_bits) == bit_widths[layer.name]
        for channel in module.weight.flatten(1):
            assert len(channel.unique()) <= (4 if module.weight_bits == 2 else 2**module.weight_bits - 1)
    assert not network.training and not any(isinstance(m, QuantizedLayer) for m in problem.network.modules())


def test_forward_is_fake_quantization(quantizer, problem):
    """The integers times the scaled weight are what rounding to multiples of the step gives."""
    network = quantizer.quantize(uniform(problem.layers, 4, 4))
    middle = network.middle
    x = torch.rand(2, 8, 8, 8) * 3
    step = middle.activation_step
    rounded = (x / step).clamp(middle.lowest, middle.highest).round() * step
    torch.testing.assert_close(middle(x), nn.functional.conv2d(rounded, middle.weight, middle.bias, padding=1))
    assert len(((x / step).clamp(middle.lowest, middle.highest).round()).unique()) <= 16


def test_eight_bits_change_little_and_two_bits_much(quantizer, problem):
    images = problem.calibration_images(seed=1)[:200]
    full = copy.deepcopy(problem.network)
    reestimate_batch_norm(full, problem.calibration_images())
    with torch.inference_mode():
        reference = full(images)
        spread = reference.std()
        errors = [(quantizer.quantize(uniform(problem.layers, b, b))(images) - reference).abs().mean() / spread for b in (8, 4, 2)]
    assert errors[0] < 0.03 and 5 * errors[0] < errors[2] and errors[0] < errors[1] < errors[2]


def test_the_same_map_gives_the_same_network(quantizer, problem):
    first, second = (quantizer.quantize(uniform(problem.layers, 2, 3)).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_map_for_another_network_names_the_layer(quantizer, problem):
    bit_widths = uniform(problem.layers, 4, 4)
    for change, name in [
        ({"stage9": Bits(4, 4)}, "stage9"),
        ({"middle": Bits(1, 4)}, "middle"),
        ({"deep": Bits(4, 9)}, "deep"),
    ]:
        with pytest.raises(ArqError, match=name):
            quantizer.quantize(bit_widths | change)
    del bit_widths["deep"]
    with pytest.raises(ArqError, match="deep"):
        quantizer.quantize(bit_widths)


def test_batch_norm_statistics_are_those_of_the_images():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5)).eval()
    images = torch.randn(512, 3, 4, 4) * 2 + 5
    reestimate_batch_norm(network, images)
    torch.testing.assert_close(network[0].running_mean, images.mean((0, 2, 3)), rtol=0.01, atol=0)
    torch.testing.assert_close(network[0].running_var, images.var((0, 2, 3)), rtol=0.05, atol=0)
    assert not network[0].training and not network[1].training and network[0].momentum == 0.1


def test_any_module_and_one_with_nothing_to_quantize():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, groups=1), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2)
    ).eval()
    layers = find_layers(network, SHAPE)
    assert [layer.name for layer in layers] == ["0", "2", "4"]
    images = torch.rand(64, *SHAPE)
    quantized = Quantizer(network, layers, images).quantize(uniform(layers, 8, 8))
    torch.testing.assert_close(quantized(images), network(images), rtol=0.1, atol=0.02)
    with pytest.raises(ArqError, match="single layer"):
        find_layers(nn.Conv2d(3, 4, 3), SHAPE)
    with pytest.raises(ArqError, match="2 ReLU"):
        find_layers(nn.Sequential(nn.ReLU(), nn.ReLU()), SHAPE)


def test_learnable_network_computes_what_the_quantized_one_does(quantizer, problem):
    bit_widths = uniform(problem.layers, 3, 4)
    images = problem.calibration_images(seed=1)[:64]
    learnable = quantizer.learnable(bit_widths)
    assert isinstance(learnable.middle, LearnableLayer) and isinstance(learnable.last, LearnableLayer)
    with torch.inference_mode():
        torch.testing.assert_close(learnable(images), quantizer.quantize(bit_widths)(images), atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # as if it had been trained
        for module in (learnable.first, learnable.middle, learnable.deep, learnable.last):
            module.weight += 0.02 * torch.randn_like(module.weight)
            module.weight_log_step += 0.1
            module.activation_log_step -= 0.1
        reestimate_batch_norm(learnable, quantizer.images)
    frozen = quantizer.freeze(learnable)
    assert isinstance(frozen.middle, QuantizedLayer) and (frozen.middle.weight_bits, frozen.middle.activation_bits) == (3, 4)
    assert not frozen.training and not any(isinstance(m, LearnableLayer) for m in frozen.modules())
    with torch.inference_mode():
        torch.testing.assert_close(frozen(images), learnable(images), atol=1e-4, rtol=1e-4)


def test_learning_lowers_the_error_of_two_bits(quantizer, problem):
    """A few steps on the FP32 network's own outputs, with weights and step sizes free."""
    learnable, images = quantizer.learnable(uniform(problem.layers, 2, 2)), problem.calibration_images()[:256]
    optimizer = torch.optim.Adam(learnable.parameters(), 2e-3)
    with torch.no_grad():
        target = problem.network(images)
    errors = []
    for _ in range(30):
        loss = nn.functional.mse_loss(learnable(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * errors[0]
    assert all(parameter.grad is not None for parameter in learnable.parameters())


def test_gradients_are_those_of_lsq():
    """Inside the range the step learns from the rounding error, outside from the bound; values learn inside only."""
    x = torch.tensor([0.26, -0.9, 3.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    learned_rounding(x, step, -1, 3, elements=3).sum().backward()
    inside = round(0.26 / 0.5) - 0.26 / 0.5
    assert step.grad.item() == pytest.approx((inside - 1 + 3) / (3 * 3) ** 0.5, rel=1e-5)
    assert x.grad.tolist() == [1, 0, 0]


@pytest.mark.parametrize("bits", [2, 8])
def test_a_step_moves_in_proportion_to_its_size(quantizer, problem, bits):
    """Adam moves every parameter by the learning rate: of itself, that would be half of an 8-bit step."""
    learnable = quantizer.learnable(uniform(problem.layers, bits, bits))
    before = learnable.middle.weight_step.detach(), learnable.middle.activation_step.detach()
    optimizer = torch.optim.Adam(learnable.parameters(), 1e-3)
    (1e3 * learnable(problem.calibration_images()[:64]).square().sum()).backward()  # above Adam's epsilon in each channel
    optimizer.step()
    for old, new in zip(before, (learnable.middle.weight_step, learnable.middle.activation_step), strict=True):
        torch.testing.assert_close((new / old).log().abs(), torch.full_like(old, 1e-3), rtol=0.01, atol=0)


def test_tied_layers_share_one_step():
    network = Projected().eval()
    layers = find_layers(network, (3, 8, 8))
    quantizer = Quantizer(network, layers, torch.rand(64, 3, 8, 8))
    quantized, learnable = quantizer.quantize(uniform(layers, 4, 4)), quantizer.learnable(uniform(layers, 4, 4))
    assert quantized.conv1.activation_step == quantized.shortcut1.activation_step != quantized.conv2.activation_step
    assert learnable.conv1.activation_log_step is learnable.shortcut1.activation_log_step
    assert quantizer.freeze(learnable).conv2.activation_step == learnable.shortcut2.activation_step


def test_half_precision_is_an_error_that_names_the_layer(problem, quantizer):
    half = copy.deepcopy(problem.network)
    half.middle.half()
    with pytest.raises(ArqError, match="'middle.weight' has values of torch.float16"):
        find_layers(half, SHAPE)
    quantized = quantizer.quantize(uniform(problem.layers, 4, 4))
    with pytest.raises(ArqError, match="'first' was given torch.float16"):
        quantized(torch.zeros(1, *SHAPE, dtype=torch.float16))
