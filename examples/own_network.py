"""A network of one's own and a folder of images: train under noise, search bit-widths, finish, certify."""

import argparse
from pathlib import Path

import gymnasium as gym
import torch
from PIL import Image
from torch import nn

from arq_agents.search import search
from arq_env.comparison import TestSettings, certify_on_test_images
from arq_env.datasets import load_dataset
from arq_env.finishing import finetuning_recipe, finish

SIGMA = 0.25


def make_net():
    """A small network with grouped and depthwise layers, for images in [0, 1]."""
    layers = []
    for inputs, outputs, groups, stride in ((3, 16, 1, 2), (16, 16, 16, 1), (16, 32, 1, 2), (32, 32, 4, 1), (32, 48, 1, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def write_photos(folder):
    """A folder in torchvision's layout, train/CLASS/ and test/CLASS/, as yours may be: here of the embedded signs."""
    signs = load_dataset("signs")
    for part, split, count in (("train", signs.train, 1_000), ("test", signs.test, 100)):
        for index, (image, label) in enumerate(zip(split.images[:count], split.labels[:count], strict=True)):
            path = folder / part / f"sign{label}" / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)


def train(network, split, steps):
    """Under Gaussian noise, as a network must be that is smoothed with it."""
    images, labels = torch.from_numpy(split.images).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(split.labels)
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,))
        noisy = images[rows] + SIGMA * torch.randn(64, *images.shape[1:])
        loss = nn.functional.cross_entropy(network(noisy), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def main(folder, steps, n):
    write_photos(folder / "photos")
    torch.manual_seed(0)
    network = train(make_net(), load_dataset("signs").train, steps)
    torch.save(network.state_dict(), folder / "net.pth")

    env = gym.make(
        "arq_env:ARQ-Custom-v0",
        network="own_network:make_net",
        checkpoint=str(folder / "net.pth"),
        data=str(folder / "photos"),
        sigma=SIGMA,
        budget=0.03,
    )
    best = search("integer_program", env, episodes=2, folder=folder / "run")
    evaluator = env.unwrapped.evaluator
    recipe = finetuning_recipe(sigma=SIGMA, epochs=1)
    quantized, _ = finish(evaluator, best.bit_widths, recipe, folder / "run/final")
    for name, classifier in {"FP32": evaluator.problem.network, "found and finished": quantized}.items():
        certificates = certify_on_test_images(evaluator.problem, classifier, TestSettings(every=1, n=n))
        print(f"{name}: ACR {certificates.acr:.3f}, clean accuracy {certificates.clean_accuracy:.2f}")
    print(f"at {best.bops_fraction:.2%} of FP32's bit operations: {best.bit_widths}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/own_network"), help="for images, weights and the run")
    parser.add_argument("--steps", type=int, default=600, help="batches of 64 that the network is trained on")
    parser.add_argument("--n", type=int, default=200, help="noise samples that count a class, for each of 100 test images")
    main(**vars(parser.parse_args()))
