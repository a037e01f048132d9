"""Networks that other people have: converted rightly, or refused in one sentence that names the part."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arq_env import ArqError
from arq_env.bitwidths import Bits, bops_fraction, restrict, uniform
from arq_env.layers import find_layers, total_macs
from arq_env.quantization import Quantizer
from arq_env.quantization.convert import check_conversion
from tests.toy import toy_problem

torch.manual_seed(0)  # of the modules that stand in the tests' parameters
SHAPE = (3, 16, 16)
NOISE = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
#: Of different colours, so that what a network says of them differs.
GENERATOR = torch.Generator().manual_seed(1)
IMAGES = torch.rand(256, 3, 1, 1, generator=GENERATOR) * (0.5 + 0.5 * torch.rand(256, *SHAPE, generator=GENERATOR))


def net(*body, channels=8) -> nn.Module:
    """A network around modules from 8 channels to ``channels``."""
    torch.manual_seed(0)
    ends = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *body, *ends).eval()


def checked(network, keep=(), shape=SHAPE):
    layers = find_layers(network, shape, keep)
    check_conversion(network, layers, torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    return layers


def error_at(network, bits, keep=()):
    """Mean error of the quantized logits over their spread."""
    layers = checked(network, keep)
    quantized = Quantizer(network, layers, IMAGES).quantize(uniform(restrict(layers, {}), bits, bits))
    with torch.inference_mode():
        expected = network(IMAGES)
        return float((quantized(IMAGES) - expected).abs().mean() / expected.std(0).mean())


def counted(network, shape=SHAPE) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, *shape))
    return counter.get_total_flops() // 2


class StandardizedConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class GainLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnInit(nn.Conv2d):
    """Its own constructor, and nothing else."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)


def hooked():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.register_forward_hook(lambda module, inputs, output: 3 * output)
    return layer


def patched():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    layer.forward = lambda x: 3 * nn.Conv2d.forward(layer, x)
    return layer


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)

    def forward(self, x):
        return F.conv2d(x, self.w, padding=1)


class ByHand(nn.Module):
    """A convolution that no counter of operators knows."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(1, 8, 16, 16))

    def forward(self, x):
        return x * self.w


class Sequence(nn.Module):
    """Positions as a sequence, through a module that takes [b, positions, c]."""

    def __init__(self, module, take=lambda y: y):
        super().__init__()
        self.module, self.take = module, take

    def forward(self, x):
        y = self.module(x.flatten(2).transpose(1, 2))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2).unflatten(2, x.shape[2:])


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, y):
        return self.inner(y, y, y)


class ReadsWeight(nn.Module):
    """A layer used as a module and past it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.a(x) + self.a.weight.sum()


UNDERSTOOD_NOT = {
    "own forward": (StandardizedConv2d(8, 8, 3, padding=1), "'2' .StandardizedConv2d, 72.7%, has a forward of its own"),
    "own forward of a linear layer": (Sequence(GainLinear(8, 8)), "'2.module' .GainLinear, .*forward of its own"),
    "hook": (hooked(), "'2' .Conv2d, 72.7%, has hooks"),
    "patched": (patched(), "'2' .Conv2d, 72.7%, has a forward of its own"),
    "older spectral norm": (nn.utils.spectral_norm(nn.Conv2d(8, 8, 1)), "has hooks: remove them, or fold them"),
    "functional": (Functional(), "'2' .Functional, 72.7%"),
    "by hand": (ByHand(), "'2.w' .a parameter that no layer owns"),
    "attention": (Sequence(SelfAttention()), "'2.module.inner' .MultiheadAttention, "),
    "recurrence": (Sequence(nn.LSTM(8, 8, batch_first=True)), "'2.module' .LSTM, "),
}


#: Multiply-accumulates where torch's counter sees none, by hand: the ends; projections, products of attention; two matrices a step.
BLIND = {"attention": 55_328 + 256 * 8 * 32 + 2 * 256 * 256 * 8, "recurrence": 55_328 + 256 * 2 * 8 * 32}


@pytest.mark.parametrize("name", UNDERSTOOD_NOT)
def test_what_is_not_understood_is_named_and_may_be_kept(name):
    part, message = UNDERSTOOD_NOT[name]
    network = net(part)
    with pytest.raises(ArqError, match=message):
        find_layers(network, SHAPE)
    layers = checked(network, keep=["2*"])
    assert total_macs(layers) == BLIND.get(name, counted(network))
    assert layers.kept and [layer.name for layer in layers] == ["0", "5"]
    assert error_at(network, 8, keep=["2*"]) < 0.2


def test_a_fraction_of_bit_operations_is_of_the_whole_network():
    network = net(Functional())
    layers = find_layers(network, SHAPE, ["2"])
    kept = 8 * 8 * 9 * 256
    fixed = sum(layer.macs for layer in layers)
    assert bops_fraction(uniform(restrict(layers, {}), 2, 2), layers) == (1024 * kept + 4 * fixed) / (1024 * (kept + fixed))


def test_keep_names_what_is_there():
    with pytest.raises(ArqError, match="keep names 'stem'"):
        find_layers(net(), SHAPE, keep=["stem"])
    layers = find_layers(net(nn.Conv2d(8, 8, 1)), SHAPE, keep="2")  # a layer that could be quantized
    assert [layer.name for layer in layers] == ["0", "5"] and layers.kept[0].macs == 64 * 256


@pytest.mark.parametrize(
    "part",
    [
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(8, 8, 3, groups=8, padding_mode="reflect", padding=1),
        OwnInit(8),
        nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(8, 8, 4, stride=2, groups=2, bias=False),
        nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1), nn.Unflatten(2, (16, 16))),
        nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv3d(2, 2, 3, padding=1), nn.Flatten(1, 2)),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1)),
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)),
        Sequence(nn.Linear(8, 8)),
    ],
    ids=lambda part: str(part).split("\n")[0][:40],
)
def test_every_kind_of_layer(part):
    network = net(part)
    layers = checked(network)
    assert len(layers) == 3 and total_macs(layers) == counted(network)
    assert error_at(network, 8) < min(0.2, error_at(network, 2) / 3)
    quantizer, bits = Quantizer(network, layers, IMAGES), uniform(layers, 4, 4)
    quantized, learnable = quantizer.quantize(bits), quantizer.learnable(bits)
    torch.testing.assert_close(learnable(NOISE), quantized(NOISE), atol=1e-3, rtol=1e-3)
    learnable(NOISE).sum().backward()
    assert all(p.grad.isfinite().all() for p in learnable.parameters())
    torch.testing.assert_close(quantizer.freeze(learnable)(NOISE), quantized(NOISE), atol=1e-3, rtol=1e-3)


def test_transposed_channels_have_their_own_steps():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1, 1))
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(6 * 25, 3)).eval()
    layers = find_layers(network, (4, 4, 4))
    weight = Quantizer(network, layers, torch.rand(32, 4, 4, 4)).quantize({layer.name: Bits(3, 8) for layer in layers})[0].weight
    for group in range(2):
        for channel in range(3):
            assert len(weight[2 * group : 2 * group + 2, channel].unique()) > 3  # none is lost beside larger ones
    bare = layer(torch.ones(1, 4, 4, 4), output_size=[5, 5])
    torch.testing.assert_close(network[0](torch.ones(1, 4, 4, 4)), bare)


class Encoder(nn.Module):
    """torch has a fused path for its layer that reads weights past the forward of the modules inside."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def test_activations_of_a_fused_encoder_are_quantized():
    torch.manual_seed(0)
    network = Encoder().eval()
    layers = checked(network, keep=["layer.self_attn"])
    assert [layer.name for layer in layers] == ["patches", "layer.linear1", "layer.linear2", "fc"]
    quantized = Quantizer(network, layers, IMAGES).quantize(uniform(layers, 2, 2))
    calls = []
    quantized.layer.linear1.kind.run, run = (lambda *a: calls.append(1) or run(*a)), quantized.layer.linear1.kind.run
    try:
        with torch.inference_mode():
            fused = quantized(NOISE)
    finally:
        quantized.layer.linear1.kind.run = run
    assert len(calls) == 3
    torch.testing.assert_close(fused, quantized(NOISE))


class Residual(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x).relu()
        for layer in (self.b, self.c):
            if self.inplace:
                x += 4 * layer(x)
            else:
                x = x + 4 * layer(x)
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_tensor_changed_in_place_is_another(inplace):
    torch.manual_seed(0)
    network = Residual(inplace).eval()
    assert not any(layer.tied_to for layer in checked(network))
    assert error_at(network, 8) < 0.1


class Views(nn.Module):
    """Three layers that read one tensor, each through a view of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = F.dropout(self.conv(x).relu(), training=self.training)
        q, k, v = (layer(x.flatten(2).transpose(1, 2)) for layer in (self.q, self.k, self.v))
        return self.fc((q * k + v).mean(1))


def test_views_of_one_tensor_are_tied():
    ties = {layer.name: layer.tied_to for layer in checked(Views().eval())}
    assert ties == {"conv": None, "q": None, "k": "q", "v": "q", "fc": None}


class Shared(nn.Module):
    """One module under two names, called by both."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.a = self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x).relu()).relu()).mean((2, 3)))


def test_a_module_used_twice_is_one_layer_with_the_cost_of_both_uses():
    torch.manual_seed(0)
    network = Shared().eval()
    layers = checked(network)
    assert [(layer.name, layer.calls) for layer in layers] == [("stem", 1), ("a", 2), ("fc", 1)]
    assert total_macs(layers) == counted(network)
    quantized = Quantizer(network, layers, IMAGES).quantize(uniform(layers, 8, 8))
    assert quantized.a is quantized.b and error_at(network, 8) < 0.1


def test_two_modules_with_one_weight_are_refused():
    network = net(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    network[3].weight = network[2].weight
    with pytest.raises(ArqError, match="'2' and '3' are two modules with one weight"):
        find_layers(network, SHAPE)


class Exits(nn.Module):
    """Leaves early for some images."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        y = self.a(x)
        return self.fc((y if x.mean() > 0.6 else self.b(y)).mean((2, 3)))


def test_a_path_that_depends_on_the_image_is_refused():
    network = Exits().eval()
    layers = find_layers(network, SHAPE)
    with pytest.raises(ArqError, match="'b' was called 1 times"):
        Quantizer(network, layers, torch.ones(4, *SHAPE))
    with pytest.raises(ArqError, match="'b' is called 1 times for one image of noise and 0 times"):
        check_conversion(network, layers, torch.ones(4, *SHAPE))


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        self.kept = self.conv(input=x)
        return self.fc(input=self.kept.mean((2, 3)))


def test_keyword_calls_and_kept_features_work():
    torch.manual_seed(0)
    network = Keyword().eval()
    network(NOISE)  # with gradients: the kept features cannot be copied by torch's deepcopy
    assert error_at(network, 8) < 0.1


class Lambda(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.body, self.function = net(), forward

    def forward(self, x):
        return self.function(self.body, x)


@pytest.mark.parametrize(
    "forward, message",
    [
        (lambda body, x: (body(x), x), "a tuple"),
        (lambda body, x: {"logits": body(x)}, "a dict"),
        (lambda body, x: body(x)[:, :1], "a tensor .2, 1."),
        (lambda body, x: body(x)[:, 0], "a tensor .2."),
        (lambda body, x: body(x) / 0, "NaN or infinite"),
        (lambda body, x: F.dropout(body(x), 0.5), "different outputs each time"),
        (lambda body, x: body(x) - body(x).mean(0), "depends on the images beside it"),
        (lambda body, x: body(x) if not body.training else (body(x), 0), "in training mode, .*auxiliary outputs"),
    ],
)
def test_networks_that_cannot_be_judged_are_refused(forward, message):
    with pytest.raises(ArqError, match=message):
        checked(Lambda(forward).eval())


def test_weights_read_past_a_layers_forward_are_noticed():
    with pytest.raises(ArqError, match="at layer '5'"):
        checked(net(ReadsWeight()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(dtype):
    with pytest.raises(ArqError, match="convert the network with .float"):
        find_layers(net().to(dtype), SHAPE)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(ArqError, match="TorchScript"):
        find_layers(torch.jit.trace(net(), NOISE), SHAPE)


def test_a_network_that_cannot_take_the_image_says_why():
    with pytest.raises(ArqError, match=r"cannot be run on an image \[1, 16, 16\]"):
        find_layers(net(), (1, 16, 16))


def test_batch_norm_that_no_image_reaches_keeps_its_statistics():
    network = net(nn.BatchNorm2d(8))
    network.unused = nn.Identity()
    network.unused.norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        network.unused.norm.running_mean.fill_(0.7)
    layers = checked(network)
    quantized = Quantizer(network, layers, IMAGES).quantize(uniform(layers, 8, 8))
    assert (quantized.unused.norm.running_mean == 0.7).all() and quantized.unused.norm.num_batches_tracked == 0


@pytest.mark.parametrize("count", [2, 129, 257])
def test_no_calibration_batch_is_too_small(count):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()
    layers = find_layers(network, (3, 2, 2))
    Quantizer(network, layers, torch.rand(count, 3, 2, 2)).quantize(uniform(layers, 8, 8))


def test_one_calibration_image_is_too_few_for_batch_norm():
    network = net(nn.BatchNorm2d(8))
    layers = find_layers(network, SHAPE)
    with pytest.raises(ArqError, match="give at least 2"):
        Quantizer(network, layers, IMAGES[:1]).quantize(uniform(layers, 8, 8))


def test_loaded_weights_change_what_a_quantized_network_computes(problem):
    quantized = Quantizer(problem.network, problem.layers, problem.calibration_images()).quantize(uniform(problem.layers, 4, 4))
    images, _ = problem.test_images(10)
    before = quantized(images)
    state = copy.deepcopy(quantized.state_dict())
    quantized.load_state_dict(state | {"last.weight_step": 2 * state["last.weight_step"], "last.bias": 2 * state["last.bias"]})
    torch.testing.assert_close(quantized(images), 2 * before)
    quantized.load_state_dict(state | {"last.codes": -state["last.codes"], "last.bias": -state["last.bias"]})
    torch.testing.assert_close(quantized(images), -before)
    with pytest.raises(RuntimeError, match="last.weight"):
        quantized.load_state_dict(problem.network.state_dict())


def test_a_filter_of_zeros_can_be_trained(problem):
    network = copy.deepcopy(problem.network)
    with torch.no_grad():
        network.middle.weight[1] = 0
        network.middle.weight[2] *= 1e-19
    learnable = Quantizer(network, problem.layers, problem.calibration_images()).learnable(uniform(problem.layers, 4, 4))
    optimizer = torch.optim.AdamW(learnable.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        learnable(problem.calibration_images()[:64]).square().sum().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in learnable.parameters())


def test_a_problem_checks_its_network():
    with pytest.raises(ArqError, match="different outputs"):
        _ = toy_problem(network=Lambda(lambda body, x: F.dropout(body(x), 0.5)).eval(), input_shape=SHAPE).layers
    half = net(nn.BatchNorm2d(8))
    half[2].train()
    with pytest.raises(ArqError, match="training mode"):
        toy_problem(network=half)
