"""Quantization-aware training under noise: from a map to a network whose weights and step sizes have learned it."""

import copy
from collections.abc import Callable
from pathlib import Path

from torch import nn

from arq_env.bitwidths import BitWidthMap
from arq_env.datasets import Dataset
from arq_env.networks.recipe import Recipe
from arq_env.networks.training import train
from arq_env.quantization.convert import Quantizer


def finetune(
    quantizer: Quantizer,
    bit_widths: BitWidthMap | None,
    recipe: Recipe,
    dataset: Dataset,
    folder: Path,
    *,
    what: dict | None = None,
    compile: bool = False,
    at_once: int | None = None,
    judge: Callable[[nn.Module], dict] | None = None,
    on_batch: Callable[[int], None] = lambda batches: None,
    on_epoch: Callable[[dict], None] = lambda record: None,
) -> tuple[nn.Module, list[dict]]:
    """Train the base network under a map; return the quantized network, and the record of each epoch.

    Weights and step sizes are learned together (LSQ: Esser et al., ICLR 2020). The network is that of the last epoch, where the
    learning rate has come to zero. ``folder`` holds the state to resume from; a killed call goes on after the last finished epoch
    and ends the same.

    :param quantizer: of the base network
    :param bit_widths: None trains the network by the same recipe without quantization, for a fair comparison
    :param recipe: such as :func:`arq_env.networks.recipe.finetuning_recipe` gives; the base network is the teacher if it distils
    :param what: what decides the result beside map, data set and recipe, as plain data for JSON
    :param compile, at_once: as for :func:`arq_env.networks.training.train`
    :param judge: what to add to an epoch's record, of the network that it would end with
    :param on_epoch: called with each epoch's record
    :raises ArqError: when the map is not one for this network, or the folder holds the state of another map, data set or recipe, or
        of another ``what``
    """
    # 1. start from float weights and the steps of calibration, all of them parameters
    network = copy.deepcopy(quantizer.network) if bit_widths is None else quantizer.learnable(bit_widths)

    def judged(record: dict) -> None:
        if judge is not None:
            record |= judge(quantizer.freeze(network))
        on_epoch(record)

    # 2. learn them together, through the rounding (LSQ, equations 1 to 3) and with the steps' gradients scaled (section 2.2)
    records = train(
        network,
        dataset,
        recipe,
        Path(folder),
        teacher=quantizer.network,
        device=str(quantizer.images.device),
        compile=compile,
        at_once=at_once,
        what={"map": bit_widths} | (what or {}),
        on_batch=on_batch,
        on_epoch=judged,
    )
    # 3. round for good, and estimate BatchNorm's statistics anew, as for deployment
    return quantizer.freeze(network), records
