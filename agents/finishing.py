"""What maps are worth once finished: each fine-tuned by one short recipe and certified on test images, by an engine.

A search can win its reward and lose the network; this is the number that counts. Options are those of a script that has called
:func:`arq_agents.shared_options.add_finishing` and :func:`arq_agents.shared_options.add_environment`.
"""

import argparse
import json
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from arq_env.bitwidths import BitWidthMap
from arq_env.comparison import TestSettings, certify_on_test_images
from arq_env.env import arq_env_of
from arq_env.evaluation import Evaluator
from arq_env.finishing import brief_recipe, finish_briefly
from arq_env.support.engines import Engine
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import read_json, sha256, write_json
from arq_env.support.provenance import provenance

from .main import make_env

Name = TypeVar("Name", bound=Hashable)


def finish(
    engine: Engine, maps: Mapping[Name, BitWidthMap | None], options: argparse.Namespace, store: Path
) -> dict[Name, np.ndarray]:
    """Name to certified radii on test images of the finished map; a map that has two names is finished once.

    :param engine: makes as many at a time as it has workers
    :param maps: name to map, None for the FP32 network after the same fine-tuning
    :param store: folder where results are kept
    """
    keys = {name: json.dumps(bit_widths) for name, bit_widths in maps.items()}
    distinct = {key: maps[name] for name, key in keys.items()}
    tasks = {key: engine.submit(_finish_one, bit_widths, options, store) for key, bit_widths in distinct.items()}
    radii = {key: task.result() for key, task in tqdm(tasks.items(), desc="finishing", unit="map")}
    return {name: radii[key] for name, key in keys.items()}


def _finish_one(bit_widths: BitWidthMap | None, options: argparse.Namespace, store: Path) -> np.ndarray:
    """One map, in a worker."""
    evaluator = arq_env_of(make_env(options)).evaluator
    settings = TestSettings(every=options.every, n0=32, n=options.n)
    return finished_radii(evaluator, bit_widths, store / "finished", steps=options.steps, settings=settings)


def finished_radii(
    evaluator: Evaluator, bit_widths: BitWidthMap | None, folder: Path, *, steps: int, settings: TestSettings
) -> np.ndarray:
    """Certified radii of a map's network after a brief fine-tuning, on test images: what a search's map is worth in the end.

    :param bit_widths: None for the FP32 network after the same fine-tuning
    :param folder: where they are kept; what is there, made alike, is not made again
    :param steps: batches of fine-tuning
    :return: [images], in units of pixels in [0, 1], 0 where the prediction is wrong
    """
    problem = evaluator.problem
    recipe = asdict(brief_recipe(problem, steps))
    identity = [bit_widths, problem.digest, problem.data_digest, recipe, asdict(settings), provenance()["versions"]]
    if problem.device.type != "cpu":
        identity.append(str(problem.device))
    path = folder / f"{sha256(json.dumps(identity).encode())[:16]}.json"
    if not path.exists():
        certificates = certify_on_test_images(problem, finish_briefly(evaluator, bit_widths, steps), settings)
        write_json(path, {"map": bit_widths, "radii": [round(float(radius), 5) for radius in certificates.certified_radius]})
    try:
        radii = np.array(read_json(path)["radii"], dtype=float)
        if radii.ndim != 1 or not radii.size or not (np.isfinite(radii) & (radii >= 0)).all():
            raise ValueError("radii that are none")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArqError(f"{path} cannot be read ({reason(error)}): delete it and run again") from error
    return radii
