"""MobileNetV2 for 32x32 images (Sandler et al. 2018, table 2): depthwise convolutions, where uniform low bits break first."""

import torch
from torch import nn

from arq_env.networks.resnet import Normalize

#: Per stage: expansion t, channels c, blocks n, stride s of the first. Of the five halvings of 224x224 images three are left.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 1), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _divisible(channels: float) -> int:
    """The nearest multiple of 8 that takes away no more than a tenth, as the authors scale widths."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ConvNormActivation(nn.Sequential):
    """A convolution, its BatchNorm, and ReLU6 unless it is the projection at the end of a block."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, groups: int = 1, linear: bool = False):
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), *([] if linear else [nn.ReLU6()]))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise convolution, 1x1 linear projection; a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * inputs
        self.expand = ConvNormActivation(inputs, hidden) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNormActivation(hidden, hidden, 3, stride, groups=hidden)
        self.project = ConvNormActivation(hidden, outputs, linear=True)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.project(self.depthwise(self.expand(x)))
        return x + out if self.shortcut else out


class MobileNetV2(nn.Module):
    """53 layers: a convolution, 17 blocks in seven stages, a 1x1 convolution, a linear layer.

    Input: images [n, 3, 32, 32] in [0, 1]; output: logits [n, classes].

    :param width: factor on the channels of all stages; the last convolution keeps its 1,280, as in the paper
    """

    def __init__(self, width: float, classes: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        inputs, blocks = _divisible(32 * width), []
        self.conv = ConvNormActivation(3, inputs, 3)
        for expansion, channels, count, stride in STAGES:
            outputs = _divisible(channels * width)
            for block in range(count):
                blocks.append(InvertedResidual(inputs, outputs, stride if block == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNormActivation(inputs, 1280)
        self.fc = nn.Linear(1280, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.head(self.blocks(self.conv(self.normalize(images))))
        return self.fc(x.mean((2, 3)))


def mobilenetv2(classes: int = 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)) -> MobileNetV2:
    """MobileNetV2 at half its width: 20,577,792 multiply-accumulates for a 32x32 image, 700,490 parameters at ten classes."""
    return MobileNetV2(0.5, classes, mean, std)
