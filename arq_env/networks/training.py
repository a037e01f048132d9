"""Training under Gaussian noise (Cohen et al. 2019, section 3.3), also with consistency regularisation (Jeong and Shin 2020).

Resumable at every epoch.
"""

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from arq_env.datasets import Dataset
from arq_env.datasets.augment import as_tensor, random_crop, to_float
from arq_env.datasets.files import ImageFiles
from arq_env.networks.checkpoints import channels_last
from arq_env.networks.memory import images_at_once
from arq_env.networks.recipe import Recipe
from arq_env.networks.state import restore_state, save_state
from arq_env.support.batches import batch_size
from arq_env.support.errors import ArqError

#: Learning rate of the logarithms of step sizes over that of weights.
STEP_RATE = 5.0
#: Part of a cycle in which the rate rises.
RISE = 0.2


def train(
    network: torch.nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    teacher: torch.nn.Module | None = None,
    device: str = "cpu",
    compile: bool = False,
    at_once: int | None = None,
    what: dict | None = None,
    on_batch: Callable[[int], None] = lambda batches: None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> list[dict]:
    """Train ``network`` in place, the rate rising and falling in one cycle or several.

    Each epoch takes one crop of each image, and ``noises`` noisy copies of it.

    After each epoch ``folder/training.pt`` holds weights, optimizer, schedule and history; a second call goes on from there
    and ends with the same weights as an uninterrupted one, since every epoch's generator is seeded by its number.

    :param teacher: network whose predictions are distilled, in evaluation mode; needed where the recipe distils
    :param device: where images, noise and network live, as torch names it
    :param compile: run through ``torch.compile`` (needs a C++ compiler; pays after about two epochs)
    :param at_once: noisy images of a step that go through the network together, at least two, their gradients added up; BatchNorm
        sees them alone. By default as many as :func:`arq_env.networks.memory.images_at_once` says, all where images are small
    :param what: whatever else decides the weights, as plain data for JSON: a state made with anything else is not resumed
    :param on_batch: called with the number of batches done since the last call, for a progress bar
    :param on_epoch: called with each epoch's record, which it may add to: epoch, loss, rate, images_per_second,
        held_out_accuracy (under noise)
    :return: the records of all epochs
    :raises ArqError: when the folder holds another training's state (recipe, data set, ``what``) or a damaged one, and when the
        recipe distils and there is no teacher, or one in training mode
    """
    if recipe.distillation and (teacher is None or teacher.training):
        raise ArqError(
            "the recipe distils and there is no teacher in evaluation mode: give teacher=, or a recipe with distillation=0"
        )
    steps = batches_per_epoch(dataset, recipe)
    given = dataset.train.images
    images = None if isinstance(given, ImageFiles) else as_tensor(given).to(device)  # those of files are too many to hold
    labels = as_tensor(dataset.train.labels).to(device)
    channels_last(network.to(device))
    copies = recipe.batch * recipe.noises
    if at_once is None:
        at_once = images_at_once(network, dataset.image_shape, copies)
    parts = max(1, min(-(-copies // at_once), recipe.batch // 2))
    step_sizes = [parameter for name, parameter in network.named_parameters() if "_log_step" in name]
    others = [parameter for name, parameter in network.named_parameters() if "_log_step" not in name]
    groups: list[dict[str, Any]] = [{"params": others}]
    rates = [recipe.peak_rate]
    if step_sizes:
        groups.append({"params": step_sizes, "weight_decay": 0.0})
        rates.append(STEP_RATE * recipe.peak_rate)
    decay, momentum = recipe.weight_decay, recipe.momentum
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adamw":  # a short memory for squares: quantized weights' gradients change as levels are crossed
        optimizer = torch.optim.AdamW(groups, recipe.peak_rate, (momentum, 0.99), weight_decay=decay)
    else:
        optimizer = torch.optim.SGD(groups, recipe.peak_rate, momentum, weight_decay=decay, nesterov=True)

    def new_cycle():
        total = recipe.epochs // recipe.cycles * steps
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            rates,
            total_steps=total,
            pct_start=RISE if RISE * total != 1 else 2 * RISE,  # torch divides by the steps of the rise less one
            cycle_momentum=False,
        )

    schedule = new_cycle()
    divided = {"parts_of_a_batch": parts} if parts > 1 else {}
    belongs_to = json.dumps({"recipe": asdict(recipe), "data set": dataset.digest} | divided | (what or {}))
    history = restore_state(folder, belongs_to, network, optimizer, schedule)
    on_batch(len(history) * steps)
    # Fusing multiplications with additions speeds up the loops around the convolutions.
    compiled = functools.partial(torch.compile, options={"cpp.enable_floating_point_contract_flag": "fast"})
    forward = compiled(network) if compile else network
    teach = None if not recipe.distillation else compiled(teacher) if compile else teacher
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=recipe.precision == "bf16")

    for epoch in range(len(history), recipe.epochs):
        if epoch % (recipe.epochs // recipe.cycles) == 0:
            schedule = new_cycle()
        generator = torch.Generator(device).manual_seed(recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(len(labels), generator=generator, device=device)
        network.train()
        total, start = torch.zeros((), device=device), time.perf_counter()
        for chosen in order[: steps * recipe.batch].split(recipe.batch):
            optimizer.zero_grad()
            for part in chosen.tensor_split(parts):
                taken = as_tensor(given[part.cpu().numpy()]).to(device) if images is None else images[part]
                batch = to_float(random_crop(taken, generator, flip=dataset.flip))
                batch = torch.cat([batch] * recipe.noises)
                noise = torch.randn(batch.shape, generator=generator, device=device)
                batch.add_(noise, alpha=recipe.sigma)
                taught = None
                with autocast:
                    if teach is not None:
                        with torch.no_grad():
                            taught = teach(batch).float()
                    logits = forward(batch).float()
                answers = len(logits) // len(batch)  # of a network that answers for several maps
                if taught is not None:
                    taught = taught.repeat(answers, 1)
                loss = smoothing_loss(
                    logits,
                    labels[part].repeat(answers),
                    noises=recipe.noises,
                    consistency=recipe.consistency,
                    entropy=recipe.entropy,
                    teacher_logits=taught,
                    distillation=recipe.distillation,
                )
                loss = loss * (len(part) / len(chosen))
                loss.backward()
                total += loss.detach()
            optimizer.step()
            schedule.step()
            on_batch(1)
        record = {
            "epoch": epoch + 1,
            "loss": total.item() / steps,
            "parts_of_a_batch": parts,
            "rate": schedule.get_last_lr()[0],
            "images_per_second": steps * recipe.batch / (time.perf_counter() - start),
            "held_out_accuracy": noisy_accuracy(network, *dataset.reward, sigma=recipe.sigma, seed=recipe.seed),
        }
        on_epoch(record)  # before the state is kept: an epoch cut off here is done again, and so is this call
        history.append(record)
        save_state(folder, belongs_to, network, optimizer, schedule, history)
    return history


def smoothing_loss(
    logits,
    labels,
    *,
    noises: int = 1,
    consistency: float = 0.0,
    entropy: float = 0.0,
    teacher_logits: torch.Tensor | None = None,
    distillation: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy over noisy copies, plus lambda mean_i KL(p || p_i) + eta H(p) for their mean prediction p.

    Jeong and Shin, Consistency Regularization for Certified Robustness of Smoothed Classifiers (NeurIPS 2020), equations 8 and 9.

    :param logits: [noises x b, classes], one copy of the whole batch after the other
    :param labels: [b]
    :param consistency: lambda
    :param entropy: eta
    :param teacher_logits: of another network on the same noisy copies, shape as ``logits``
    :param distillation: share d of the teacher in the cross-entropy: (1 - d) CE(label, p_i) + d CE(teacher, p_i)
    """
    log_p = functional.log_softmax(logits, dim=1)
    loss = functional.nll_loss(log_p, labels.repeat(noises))
    if teacher_logits is not None:
        taught = -(functional.softmax(teacher_logits, dim=1) * log_p).sum(1).mean()
        loss = (1 - distillation) * loss + distillation * taught
    if consistency or entropy:
        log_mean = log_p.unflatten(0, (noises, -1)).logsumexp(0) - math.log(noises)
        mean = log_mean.exp()
        divergence = (mean * (log_mean - log_p.unflatten(0, (noises, -1)))).sum(-1).mean()
        loss = loss + consistency * divergence - entropy * (mean * log_mean).sum(-1).mean()
    return loss


def batches_per_epoch(dataset: Dataset, recipe: Recipe) -> int:
    """Full batches in the training images.

    :raises ArqError: when there is not even one
    """
    there = len(dataset.train.images)
    for name in ("batch", "images"):
        if getattr(recipe, name) > there:
            raise ArqError(f"{name} is {getattr(recipe, name)}: there are {there} training images")
    if 0 < recipe.images < recipe.batch:
        raise ArqError(f"batch is {recipe.batch}: an epoch has {recipe.images} images")
    return (recipe.images or there) // recipe.batch


@torch.inference_mode()
def noisy_accuracy(network, images, labels, *, sigma: float, seed: int = 0, batch: int = 256) -> float:
    """Accuracy of the base classifier on single noisy images: one draw of N(0, sigma^2) an image.

    :param images: uint8 [n, h, w, channels]
    :param batch: images at once, fewer of large ones
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    generator = torch.Generator().manual_seed(seed)
    right, batch = 0, batch_size(math.prod(images.shape[1:]), batch)
    for start in range(0, len(images), batch):
        part = to_float(as_tensor(images[start : start + batch]))
        part.add_(torch.randn(part.shape, generator=generator), alpha=sigma)
        right += int((network(part.to(device)).argmax(1).cpu() == as_tensor(labels[start : start + batch])).sum())
    network.train(was_training)
    return right / len(images)
