"""Measure seconds and peak memory of one evaluation of a large network, or of one step of its fine-tuning.

On synthetic images of 224x224 in JPEG files.

The weights are random and the labels what the network says, for neither changes what an evaluation costs. Seconds are those of
the processor.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    from arq_env.registration import ENVIRONMENTS

    ids = [name for name, arguments in ENVIRONMENTS.items() if arguments.get("data") == "imagenet"]
    parser = command_line.parser(__doc__)
    parser.add_argument("--env", choices=ids, default=ids[0], help="whose network")
    for name, what in (("images", "reward images"), ("calibration-images", "training images that ranges come from")):
        parser.add_argument(f"--{name}", type=shared_options.whole(2), help=f"{what} (default: as in a search)")
    parser.add_argument("--files", type=shared_options.whole(32), default=600, help="different images for each of the two")
    parser.add_argument("--finetuning", action="store_true", help="a step of fine-tuning in place of an evaluation")
    parser.add_argument(
        "--output", type=Path, default=Path("experiments/results/large_images"), help="folder for a JSON file named by the id"
    )
    return parser.parse_args()


options = command_line.start(__name__, parse)

import resource
import tempfile
import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from arq_env.bitwidths import uniform
from arq_env.datasets import Dataset, Split
from arq_env.datasets.augment import as_tensor, to_float
from arq_env.datasets.files import ImageFiles
from arq_env.evaluation import Evaluator
from arq_env.finishing import brief_recipe, finish_briefly
from arq_env.networks.checkpoints import build_network, channels_last
from arq_env.networks.memory import images_at_once
from arq_env.problem import Problem
from arq_env.quantization.calibrate import reestimate_batch_norm
from arq_env.registration import ENVIRONMENTS
from arq_env.rewards import settings_for
from arq_env.sensitivity import forward_passes
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance

EDGE, SIGMA = 256, 0.01  # little noise, so that random weights are not refused


def write_files(folder: Path, count: int) -> list[Path]:
    """Clouds of colour with noise, which JPEG compresses as it does photographs."""
    rng, files = np.random.default_rng(0), []
    for i in tqdm(range(count), unit="image", desc="drawing"):
        clouds = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((EDGE, EDGE), Image.Resampling.BICUBIC)
        noisy = np.asarray(clouds, float) + rng.normal(0, 12, (EDGE, EDGE, 3))
        files.append(folder / f"{i:05}.jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(files[-1], quality=90)
    return files


@torch.inference_mode()
def labelled(network, files: list[Path], size: int) -> Dataset:
    """Three parts of the files, each image with the class that the network says."""
    parts = []
    for part in np.array_split(np.array(files, dtype=object), 3):
        images = ImageFiles(part.tolist(), size)
        said = [network(to_float(as_tensor(images[slice(i, i + 16)]))).argmax(1) for i in range(0, len(images), 16)]
        parts.append(Split(images, torch.cat(said).numpy()))
    return Dataset("synthetic", tuple(map(str, range(1000))), True, *parts)


def measured(call) -> float:
    """Processor seconds that a call takes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main(options):
    named = ENVIRONMENTS[options.env]
    torch.manual_seed(0)
    network = channels_last(build_network(named["network"]).eval())
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder), 3 * options.files)
        reestimate_batch_norm(network, to_float(as_tensor(ImageFiles(files[:32], named["image_size"])[:])))
        data = labelled(network, files, named["image_size"])
        problem = Problem(network, partial(lambda data: data, data), SIGMA)
        given = {name: getattr(options, name) for name in ("images", "calibration_images") if getattr(options, name) is not None}
        settings = settings_for(problem, **given)
        evaluator = Evaluator(problem, settings)
        once = measured(lambda: (evaluator.reference, evaluator.quantizer))
        bit_widths = uniform(problem.layers, 4, 4)
        steps = measured(lambda: evaluator.quantizer.quantize(bit_widths))  # chosen once a search, for each layer and bit-width
        if options.finetuning:
            seconds = measured(lambda: finish_briefly(evaluator, bit_widths, 1))
        else:
            seconds = measured(lambda: evaluator.evaluate(bit_widths))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    document = {"env": options.env, "network": named["network"], "settings": vars(settings)}
    if options.finetuning:
        batch, what = brief_recipe(problem, 1).batch, "a step of fine-tuning"
        at_once = images_at_once(evaluator.quantizer.learnable(bit_widths), problem.dataset.image_shape, batch)
        document |= {"processor_seconds": seconds, "batch": batch, "images_at_once": at_once}
    else:
        what = f"an evaluation ({settings.forward_passes} images)"
        document |= {
            "forward_passes": settings.forward_passes,
            "processor_seconds": {"once": once, "first_quantization": steps, "evaluation": seconds},
            "processor_seconds_a_forward_pass": seconds / settings.forward_passes,
            "forward_passes_of_sensitivities": forward_passes(),
        }
    document |= {
        "peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    write_json(options.output / f"{options.env}{'-finetuning' if options.finetuning else ''}.json", document)
    print(f"{options.env}: {seconds:.0f} s of a core {what}, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
