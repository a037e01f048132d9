"""Random small networks: quantized rightly at 8 bits and counted exactly, or refused in one sentence."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.layers import find_layers, total_macs
from arq_env.quantization import Quantizer
from arq_env.quantization.calibrate import reestimate_batch_norm
from arq_env.quantization.convert import check_conversion
from tests.test_own_networks import StandardizedConv2d

SIZE = 12
#: Size of the error at 8 bits over that of the logits. Half of the networks are below .01, where a lost factor or layer is near 1.
FAR = 0.2


class Block(nn.Module):
    """One layer in one of many uses; keeps [b, c, h, w] but for stride."""

    def __init__(self, kind, inputs, outputs, use, norm, activation, geometry):
        super().__init__()
        self.use, self.activation = use, activation
        groups = {"grouped": 2, "depthwise": inputs}.get(geometry, 1)
        outputs = inputs if geometry == "depthwise" or use != "plain" else outputs
        odd = {"dilation": 2, "padding": 2} if geometry == "dilated" else {"padding": 1}
        if geometry == "reflect":
            odd["padding_mode"] = "reflect"
        if geometry == "same":
            odd = {"padding": "same"}
        if kind == "transposed":
            self.layer = nn.ConvTranspose2d(inputs, outputs, 3, padding=1, groups=groups)
        elif kind == "linear":
            self.layer = nn.Linear(inputs, outputs)
        elif kind == "conv1d":
            self.layer = nn.Conv1d(inputs, outputs, 3, padding=1, groups=groups)
        elif kind == "own forward":
            self.layer = StandardizedConv2d(inputs, outputs, 3, padding=1)
        elif kind == "functional":
            self.w = nn.Parameter(torch.randn(outputs, inputs, 1, 1) / inputs**0.5)
            self.layer = lambda x: F.conv2d(x, self.w)
        else:
            self.layer = nn.Conv2d(
                inputs, outputs, 3, stride=2 if geometry == "stride" and use == "plain" else 1, groups=groups, **odd
            )
            if kind == "weight norm":
                self.layer = nn.utils.parametrizations.weight_norm(self.layer)
        self.kind, self.outputs = kind, outputs
        norms = {"batch": nn.BatchNorm2d, "group": lambda c: nn.GroupNorm(1, c), "none": lambda c: nn.Identity()}
        self.norm = norms[norm](outputs)

    def apply_layer(self, x):
        if self.kind == "linear":
            return self.layer(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])).view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
        if self.kind == "conv1d":
            return self.layer(x.flatten(2)).unflatten(2, x.shape[2:])
        return self.layer(x)

    def forward(self, x):
        act = getattr(F, self.activation)
        y = act(self.norm(self.apply_layer(x)))
        if self.use == "twice":
            y = act(self.apply_layer(y))  # without the norm: statistics of two uses fit neither
        elif self.use == "residual":
            y = x + y
        elif self.use == "in place":
            x = x.clone()
            x += y
            y = x + self.apply_layer(x)
        elif self.use == "view":
            y = y + self.apply_layer(x.view(x.shape))
        return y


BLOCK = st.tuples(
    st.sampled_from(["conv", "conv", "conv", "linear", "transposed", "conv1d", "weight norm", "own forward", "functional"]),
    st.sampled_from([4, 6, 8]),
    st.sampled_from(["plain", "plain", "twice", "residual", "in place", "view"]),
    st.sampled_from(["batch", "group", "none"]),
    st.sampled_from(["relu", "silu", "gelu", "leaky_relu", "hardswish", "tanh"]),
    st.sampled_from(["plain", "grouped", "depthwise", "dilated", "stride", "reflect", "same"]),
)


def build(blocks) -> nn.Module:
    torch.manual_seed(0)
    channels, body = 4, [nn.Conv2d(3, 4, 3, padding=1)]
    for kind, outputs, *rest in blocks:
        body.append(Block(kind, channels, outputs, *rest))
        channels = body[-1].outputs
    network = nn.Sequential(*body, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * channels, 5, bias=False))
    reestimate_batch_norm(network.eval(), images())
    return network


def images() -> torch.Tensor:
    """Of different colours, so that what a network says of them differs."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(32, 3, 1, 1, generator=generator) * torch.rand(32, 3, SIZE, SIZE, generator=generator)


def right_or_refused(blocks):
    network, shape = build(blocks), (3, SIZE, SIZE)
    foreign = {"own forward", "functional"}
    try:
        layers = find_layers(network, shape)
        check_conversion(network, layers, torch.rand(2, *shape))
        refused = ""
    except ArqError as error:
        refused = str(error)
    assert bool(refused) == bool(foreign & {block[0] for block in blocks}) and "\n" not in refused, refused
    if refused:
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.rand(1, *shape))
    assert total_macs(layers) == counter.get_total_flops() // 2
    quantized = Quantizer(network, layers, images()).quantize(uniform(layers, 8, 8))
    with torch.inference_mode():
        expected = network(images())
        assert (quantized(images()) - expected).norm() < FAR * expected.norm()


def run(examples: int) -> None:
    patient = settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    patient(given(st.lists(BLOCK, min_size=1, max_size=4))(right_or_refused))()


@pytest.mark.slow
def test_random_networks_are_right_or_refused():
    run(30)


@pytest.mark.slow
def test_many_random_networks_are_right_or_refused():
    run(300)
