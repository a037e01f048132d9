"""From a map to the finished network: quantization-aware training under noise."""

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from arq_env.bitwidths import BitWidthMap
from arq_env.certification import Cohen, certify
from arq_env.evaluation import Evaluator
from arq_env.networks.recipe import Recipe, finetuning_recipe
from arq_env.networks.training import train
from arq_env.problem import Problem

#: Images of the reward split that epochs are judged on, at most.
HELD_OUT = 464


def brief_recipe(problem: Problem, steps: int, seed: int = 0) -> Recipe:
    """The same recipe cut to so many batches: for telling how maps compare once finished, not for networks to ship."""
    recipe = finetuning_recipe(problem.sigma, seed=seed, precision="bf16", start=problem.card.get("digest", ""))
    there = len(problem.dataset.train.images)
    recipe = replace(recipe, batch=min(recipe.batch, there))
    epochs = math.ceil(steps * recipe.batch / there)
    return replace(recipe, epochs=epochs, images=steps // epochs * recipe.batch)


def finish_briefly(evaluator: Evaluator, bit_widths: BitWidthMap | None, steps: int, seed: int = 0) -> torch.nn.Module:
    """The quantized network after :func:`brief_recipe`; for None the FP32 network after it."""
    problem, network = evaluator.problem, _trainable(evaluator, bit_widths)
    recipe = brief_recipe(problem, steps, seed)
    with tempfile.TemporaryDirectory() as folder:
        train(network, problem.dataset, recipe, Path(folder), teacher=problem.network, device=str(problem.device))
    return evaluator.quantizer.freeze(network)


def _trainable(evaluator: Evaluator, bit_widths: BitWidthMap | None) -> torch.nn.Module:
    """What is trained for a map; for None a copy of the FP32 network."""
    return copy.deepcopy(evaluator.problem.network) if bit_widths is None else evaluator.quantizer.learnable(bit_widths)


def finetune(
    evaluator: Evaluator,
    bit_widths: BitWidthMap | None,
    recipe: Recipe,
    folder: Path,
    *,
    compile: bool = False,
    on_batch: Callable[[int], None] = lambda batches: None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> tuple[torch.nn.Module, list[dict]]:
    """Train the base network under a map; return the quantized network, and the record of each epoch.

    Weights and step sizes are learned together (LSQ); before each judgement BatchNorm's statistics are estimated anew, as they
    are for deployment. The network is that of the last epoch, where the learning rate has come to zero: epochs differ by less
    than a held-out ACR of affordable size can tell. ``folder`` holds the state to resume from; a killed call goes on after the
    last finished epoch and ends the same.

    :param bit_widths: None trains the FP32 network by the same recipe, for a fair comparison
    :param recipe: such as :func:`finetuning_recipe` gives; with distillation the base network is the teacher
    :param on_epoch: called with each epoch's record, with ``held_out_acr`` in it
    :raises ArqError: when the map is not one for this network, or the folder holds the state of another map, network, data set,
        recipe or evaluator
    """
    problem, quantizer, settings = evaluator.problem, evaluator.quantizer, evaluator.settings
    what = {
        "map": bit_widths,
        "network": problem.digest,
        # what decides calibration and held-out images
        "evaluator": {name: getattr(settings, name) for name in ("seed", "calibration_images", "images", "first")},
    }
    network = _trainable(evaluator, bit_widths)

    def judge(record):
        record["held_out_acr"] = held_out_acr(evaluator, quantizer.freeze(network))
        on_epoch(record)

    records = train(
        network,
        problem.dataset,
        recipe,
        Path(folder),
        teacher=problem.network,
        device=str(problem.device),
        compile=compile,
        what=what,
        on_batch=on_batch,
        on_epoch=judge,
    )
    return quantizer.freeze(network), records


def held_out_acr(evaluator: Evaluator, network: torch.nn.Module) -> float:
    """ACR at n = 64, alpha = 0.05, on the images of the reward split that :func:`held_out` gives."""
    problem = evaluator.problem
    images, labels = problem.reward_images(*held_out(evaluator)[:2])
    judged = {"n0": 8, "n": 64, "alpha": 0.05, "seed": evaluator.settings.seed, "method": Cohen(skip_wrong=True)}
    return certify(network, images, labels, sigma=problem.sigma, **judged).acr


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
