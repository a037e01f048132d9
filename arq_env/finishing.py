"""From a map to the finished network of a problem: fine-tuned, and judged on images that no map was rewarded on."""

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from arq_env.bitwidths import BitWidthMap
from arq_env.certification import Cohen, certify
from arq_env.evaluation import Evaluator
from arq_env.networks.recipe import Recipe, finetuning_recipe
from arq_env.problem import Problem
from arq_env.quantization.files import load_quantized, save_quantized
from arq_env.quantization.finetuning import finetune
from arq_env.support.errors import ArqError
from arq_env.support.files import sha256
from arq_env.support.machine import fastest_precision
from arq_env.support.provenance import provenance

#: Images of the reward split that epochs are judged on, at most.
HELD_OUT = 464


def brief_recipe(problem: Problem, steps: int, seed: int = 0) -> Recipe:
    """The reported figures' recipe cut to so many batches, in the precision that is fastest here: for telling how maps compare once
    finished, not for networks to ship.
    """
    precision = fastest_precision(problem.device)
    recipe = finetuning_recipe(problem.sigma, seed=seed, precision=precision, start=problem.start)
    there = len(problem.dataset.train.images)
    recipe = replace(recipe, batch=min(recipe.batch, there))
    epochs = math.ceil(steps * recipe.batch / there)
    return replace(recipe, epochs=epochs, images=steps // epochs * recipe.batch)


def finish_briefly(evaluator: Evaluator, bit_widths: BitWidthMap | None, steps: int, seed: int = 0) -> torch.nn.Module:
    """The quantized network after :func:`brief_recipe`; for None the FP32 network after it."""
    problem, recipe = evaluator.problem, brief_recipe(evaluator.problem, steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        network, _ = finetune(evaluator.quantizer, bit_widths, recipe, problem.dataset, Path(folder))
    return network


def finished_network(evaluator: Evaluator, bit_widths: BitWidthMap, folder: Path, steps: int) -> torch.nn.Module:
    """The network of :func:`finish_briefly` as ``network.safetensors`` in a folder has it, where it is made once.

    :raises ArqError: when the file there is of another map, network or recipe, or cannot be read or written
    """
    problem, path = evaluator.problem, Path(folder) / "network.safetensors"
    recipe, calibration = asdict(brief_recipe(problem, steps)), [evaluator.settings.seed, evaluator.settings.calibration_images]
    made_from = sha256(json.dumps([bit_widths, problem.digest, problem.data_digest, recipe, calibration]).encode())
    if not path.exists():
        card = {key: problem.card.get(key) for key in ("network", "dataset", "training")}
        card |= {"sigma": problem.sigma, "input_shape": list(problem.dataset.image_shape), "recipe": recipe, "made_from": made_from}
        save_quantized(finish_briefly(evaluator, bit_widths, steps), path, card | provenance())
    network, card = load_quantized(path, problem.network)
    if card.get("made_from") != made_from:
        raise ArqError(f"{path} is of another map, network or recipe: remove {folder}, or choose another --output")
    return network.to(problem.device)


def finish(
    evaluator: Evaluator,
    bit_widths: BitWidthMap | None,
    recipe: Recipe,
    folder: Path,
    *,
    compile: bool = False,
    at_once: int | None = None,
    on_batch: Callable[[int], None] = lambda batches: None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> tuple[torch.nn.Module, list[dict]]:
    """Fine-tune a problem's network under a map (:func:`arq_env.quantization.finetuning.finetune`), each epoch judged.

    Epochs differ by less than a held-out ACR of affordable size can tell, so nothing is chosen by it.

    :param bit_widths: None trains the FP32 network by the same recipe
    :param folder: holds the state that a killed call goes on from
    :param compile, at_once: as for :func:`arq_env.networks.training.train`
    :param on_epoch: called with each epoch's record, with ``held_out_acr`` in it
    :return: the quantized network, and the record of each epoch
    :raises ArqError: when the map is not one for this network, or the folder holds the state of another map, network, data set,
        recipe or evaluator
    """
    problem, settings = evaluator.problem, evaluator.settings
    what = {
        "network": problem.digest,
        # what decides calibration and held-out images
        "evaluator": {name: getattr(settings, name) for name in ("seed", "calibration_images", "images", "first")},
    }
    return finetune(
        evaluator.quantizer,
        bit_widths,
        recipe,
        problem.dataset,
        folder,
        what=what,
        compile=compile,
        at_once=at_once,
        judge=lambda network: {"held_out_acr": held_out_acr(evaluator, network)},
        on_batch=on_batch,
        on_epoch=on_epoch,
    )


def held_out_acr(evaluator: Evaluator, network: torch.nn.Module) -> float:
    """ACR at n = 64, alpha = 0.05, on the images of the reward split that :func:`held_out` gives."""
    problem = evaluator.problem
    images, labels = problem.reward_images(*held_out(evaluator)[:2])
    seed, method = evaluator.settings.seed, Cohen(skip_wrong=True)
    return certify(network, images, labels, sigma=problem.sigma, n0=8, n=64, alpha=0.05, seed=seed, method=method).acr


def held_out(evaluator: Evaluator) -> tuple[int, int, bool]:
    """Images of the reward split to judge epochs on: how many, the index of the first, and whether no map was rewarded on them.

    They are the last of those that no map was rewarded or confirmed on (:meth:`arq_env.evaluation.Evaluator.second_opinion`); else
    of those that none was rewarded on; else, where the evaluator rewards maps on all images, of these.
    """
    settings, there = evaluator.settings, len(evaluator.problem.dataset.reward.images)
    rewarded = settings.first + settings.images
    for first, end in ((rewarded + 2 * settings.images, there), (rewarded, there), (0, settings.first)):
        if first < end:
            count = min(HELD_OUT, end - first)
            return count, end - count, True
    count = min(HELD_OUT, there)
    return count, there - count, False
