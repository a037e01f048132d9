"""ResNet for 32x32 images (He et al. 2016, section 4.2), with parameter-free shortcuts."""

import torch
from torch import nn
from torch.nn import functional


class Normalize(nn.Module):
    """Per-channel normalisation as a part of the network, so that noise is added to pixels in [0, 1] before it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes the shortcut subsamples and pads channels with zeros (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return functional.relu(out + x)


class ResNet(nn.Module):
    """6 ``blocks`` + 2 layers in three stages of 16, 32 and 64 channels.

    Input: images [n, 3, 32, 32] in [0, 1]; output: logits [n, classes].
    """

    stage1: nn.Sequential
    stage2: nn.Sequential
    stage3: nn.Sequential

    def __init__(self, blocks: int, classes: int, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        inputs = 16
        for stage, outputs in enumerate((16, 32, 64), start=1):
            stride = 1 if stage == 1 else 2
            sequence = [BasicBlock(inputs if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)]
            setattr(self, f"stage{stage}", nn.Sequential(*sequence))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn(self.conv(self.normalize(images))))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean((2, 3)))


def resnet20(classes: int = 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)) -> ResNet:
    """ResNet-20: 40,551,040 multiply-accumulates for a 32x32 image, 269,722 parameters at ten classes."""
    return ResNet(3, classes, mean, std)


def resnet32(classes: int = 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)) -> ResNet:
    """ResNet-32: 68,862,592 multiply-accumulates for a 32x32 image, 464,154 parameters at ten classes."""
    return ResNet(5, classes, mean, std)
