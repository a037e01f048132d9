"""Multiply-accumulates of known networks, against torchvision's published numbers and torch's own counter."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arq_env import ArqError
from arq_env.layers import find_layers, total_macs
from arq_env.networks.resnet import resnet20
from arq_env.support.torchvision_import import import_torchvision

models = import_torchvision().models


class Unusual(nn.Sequential):
    """Grouped, dilated, depthwise and transposed convolutions."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=2, dilation=2),
            nn.Conv2d(12, 12, 3, groups=12, padding="same", padding_mode="reflect"),
            nn.Conv2d(12, 24, 5, groups=4, stride=2),
            nn.ConvTranspose2d(24, 8, 4, stride=2, groups=2, output_padding=1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        )


def counted(network, shape) -> int:
    """By torch's counter; a multiply-accumulate is two operations."""
    fused = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.zeros(1, *shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused[0])
        torch._C._set_mkldnn_enabled(fused[1])
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    "name, weights",
    [("resnet50", "ResNet50_Weights"), ("mobilenet_v2", "MobileNet_V2_Weights"), ("densenet121", "DenseNet121_Weights")],
)
def test_torchvision_s_networks(name, weights):
    network, shape = getattr(models, name)(weights=None).eval(), (3, 224, 224)
    found = total_macs(find_layers(network, shape))
    published = getattr(models, weights).IMAGENET1K_V1.meta["_ops"]  # in 10^9, with three digits
    assert abs(found / 1e9 - published) <= 0.0005 + 1e-9
    assert found == counted(network, shape)


def test_a_vision_transformer():
    """The packed projections and the products of attention count as what is kept."""
    network = models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10).eval()
    layers = find_layers(network, (3, 32, 32), keep=["*self_attention", "*pos_embedding"])
    tokens, width = 17, 32
    attention = 4 * tokens * width * width + 2 * tokens * tokens * width
    assert [kept.macs for kept in layers.kept if kept.macs] == [attention, attention]
    patches = 16 * (3 * 8 * 8) * width
    assert total_macs(layers) == patches + 2 * (attention + 2 * tokens * width * 64) + width * 10


class Attention(nn.Module):
    """By torch's function, of whose kernels for a CPU torch's own table of operations knows nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images):
        x = self.first(images.flatten(2))
        return self.last(nn.functional.scaled_dot_product_attention(x, x, x).mean(1))


def test_attention_is_counted():
    layers = find_layers(Attention().eval(), (4, 2, 3), keep=["."])
    assert [kept.macs for kept in layers.kept] == [2 * 4 * 4 * 6]
    with pytest.raises(ArqError, match="full precision"):
        find_layers(Attention().eval(), (4, 2, 3))


@pytest.mark.parametrize("network, shape", [(resnet20, (3, 32, 32)), (Unusual, (3, 20, 24))])
def test_others(network, shape):
    network = network().eval()
    assert total_macs(find_layers(network, shape)) == counted(network, shape)
    if shape == (3, 32, 32):
        assert round(total_macs(find_layers(network, shape)) / 1e6, 1) == 40.6  # 40.55 M, as published tables round it
