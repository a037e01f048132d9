"""Measure images a second of a finished network and of its files, beside FP32, on one thread, in turns. A stopped run starts over.

Seconds are those of the processor, so that what else runs on the machine counts little.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("run", type=Path, help="run folder of finalize.py, for a shipped checkpoint")
    parser.add_argument("--batches", type=shared_options.whole(1), nargs="+", default=[1, 32], help="images of a forward pass")
    parser.add_argument("--rounds", type=shared_options.whole(1), default=10, help="turns of each; the fastest counts")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one turn")
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of the images")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/export"), help="folder for the table")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import tempfile
import time
from functools import partial

import torch
from tqdm import tqdm

from arq_env.certification import CompiledNetwork
from arq_env.export.loading import input_shape_of, load_with_card
from arq_env.export.onnx_export import save_onnx
from arq_env.networks.checkpoints import Checkpoint, load_checkpoint
from arq_env.quantization.integer import integer_kernels, integer_network
from arq_env.support.files import write_json
from arq_env.support.provenance import EXPORT_PACKAGES, provenance


def main(options):
    torch.set_num_threads(1)
    network, card = load_with_card(options.run)
    fp32, _ = load_checkpoint(Checkpoint(*(card[key] for key in ("network", "dataset", "sigma", "training"))))
    with tempfile.TemporaryDirectory() as folder:
        write = partial(save_onnx, path=Path(folder) / "network.onnx", card=card, input_shape=input_shape_of(card))
        files = {
            "FP32, ONNX Runtime": write(fp32),
            "quantized, ONNX file": write(network),
            "quantized, ONNX file on integers": write(network, integers=True),
        }
    table = {}
    for batch in options.batches:
        images = torch.rand(batch, *input_shape_of(card), generator=torch.Generator().manual_seed(options.seed))
        table[f"batch {batch}"] = rates(engines(fp32, network, files, batch), images, options)
    document = {
        "network": {key: card[key] for key in ("map", "network", "dataset", "sigma", "training", "digest")},
        "threads": torch.get_num_threads(),
        "images_per_second": table,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "seed": options.seed,
        "provenance": provenance(EXPORT_PACKAGES),
    }
    path = options.output / f"speed-{options.run.name}.json"
    write_json(path, document)
    width = max(map(len, table[f"batch {options.batches[0]}"]))
    for name in table[f"batch {options.batches[0]}"]:
        print(f"{name:{width}}" + "".join(f"{there[name]:10,.0f}" for there in table.values()))
    print(path)


def engines(fp32, network, files, batch: int) -> dict:
    """Whatever gives logits for a batch, by name."""
    channels_last = torch.channels_last
    modules = {"FP32, PyTorch": fp32, "FP32, PyTorch compiled": CompiledNetwork(fp32, batch), "quantized, PyTorch": network}
    if integer_kernels():
        modules["quantized, PyTorch on integer kernels"] = integer_network(network)
    called = {
        name: lambda images, module=module: module(images.to(memory_format=channels_last)) for name, module in modules.items()
    }
    return called | files


def rates(engines: dict, images: torch.Tensor, options) -> dict:
    """Images a second of each: the best of some turns, since caches that others use, too, only slow down."""
    best = dict.fromkeys(engines, 0.0)
    with torch.inference_mode():
        for run in engines.values():  # what is compiled at the first call
            run(images)
        for _ in tqdm(range(options.rounds), desc=f"batch {len(images)}"):
            for name, run in engines.items():
                start, done = time.process_time(), 0
                while (elapsed := time.process_time() - start) < options.seconds:
                    run(images)
                    done += len(images)
                best[name] = max(best[name], done / elapsed)
    return best


if __name__ == "__main__":
    command_line.run(main, options, resumes=False)
