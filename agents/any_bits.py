"""Training one network for every bit-width map: maps of all budgets between two, drawn as an environment would end with them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from arq_env.bitwidths import BitWidthMap, fixed_layers, uniform
from arq_env.env import ArqEnv, next_bits
from arq_env.networks.recipe import Recipe
from arq_env.networks.training import train
from arq_env.quantization.any_bits import AnyBitsQuantizer, ManyMaps, start_any_bits
from arq_env.support.errors import ArqError

from .any_budget import check_budgets

#: Uniform bits that an epoch is judged by.
JUDGED = (2, 3, 4, 8)


def train_any_bits(
    env: ArqEnv,
    recipe: Recipe,
    folder: Path,
    *,
    budgets: tuple[float, float],
    maps: int = 2,
    at_once: int | None = None,
    on_batch: Callable[[int], None] = lambda batches: None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> tuple[nn.Module, list[dict]]:
    """Train weights that stand any map; resumable as :func:`arq_env.networks.training.train` is.

    Each step learns from the uniform maps of the fewest and the most bits, and from ``maps`` maps of random actions at budgets
    drawn between two, evenly on a log scale.

    :param env: its network, data, layers and kind of budget
    :param recipe: such as :func:`arq_env.networks.recipe.finetuning_recipe` gives; the FP32 network is the teacher
    :param budgets: least and greatest, in the measure of the environment's budget
    :param on_epoch: called with each epoch's record: epoch, loss, rate, images_per_second, and what uniform bits keep of FP32's
        ACR on the reward images with no training of their own, as ``acr_W3A3``
    :return: the any-bits network, in evaluation mode, and the records of all epochs
    :raises ArqError: when the environment's weights stand any map already, for budgets that cannot be met, or when the folder holds
        the state of another training
    """
    problem, evaluator = env.problem, env.evaluator
    if problem.any_bits is not None:
        raise ArqError("the environment has weights that stand any map already: leave --weights out")
    if recipe.noises > 1:
        raise ArqError("several maps take the place of several noisy copies: give a recipe with noises=1")
    network = ManyMaps(start_any_bits(evaluator.quantizer), drawn_maps(env, budgets, maps), recipe.seed)
    what = {
        "network": problem.digest,
        "fixed": fixed_layers(env.layers),
        "widths": env.widths,
        "budgets": [env.default_budget.at(budget).spec for budget in budgets],
        "maps": maps,
        "calibration": [evaluator.settings.seed, evaluator.settings.calibration_images],
    }

    def judge(record: dict) -> None:
        del record["held_out_accuracy"]  # of whatever bits came last, on statistics of all
        quantizer = AnyBitsQuantizer(problem.network, env.layers, evaluator.quantizer.images, network.network)
        for bits in (bits for bits in JUDGED if bits in env.widths):
            same = uniform(env.layers, bits, bits)
            evaluation = evaluator.measure(partial(quantizer.quantize, same, integers=True))
            record[f"acr_W{bits}A{bits}"] = evaluation.acr / evaluator.reference.acr
        on_epoch(record)

    records = train(
        network,
        problem.dataset,
        recipe,
        folder,
        teacher=problem.network,
        device=str(problem.device),
        at_once=at_once,
        what=what,
        on_batch=on_batch,
        on_epoch=judge,
    )
    return network.network.eval(), records


def drawn_maps(env: ArqEnv, budgets: tuple[float, float], count: int) -> Callable[[np.random.Generator], list[BitWidthMap]]:
    """A function from a generator to the maps of a step: the fewest bits, the most, and ``count`` maps of drawn budgets."""
    check_budgets(env.default_budget, *budgets)
    low, high = np.log(budgets)
    ends = [uniform(env.layers, bits, bits) for bits in (env.widths[0], env.widths[-1])]

    def draw(rng: np.random.Generator) -> list[BitWidthMap]:
        maps = [*ends]
        for _ in range(count):
            budget = env.default_budget.at(float(np.exp(rng.uniform(low, high))))
            chosen: BitWidthMap = {}
            for layer in env.free_layers:
                chosen[layer.name] = next_bits(rng.uniform(-1, 1, 2), budget, chosen)
            maps.append(env.complete(chosen))
        return maps

    return draw
