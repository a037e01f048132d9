"""Does the deployed file do what the network does? Labels, certificates and bytes of finished networks and their files.

Each network is written as ONNX (with DequantizeLinear, and on integers) and packed, and read again. On noisy test images, one
noise each, labels of PyTorch and of ONNX Runtime are compared; where they differ, the first layer is found at which a code does,
and how far the value was from the middle between its two codes. Then both are certified on the same images and noise. Stop it at
any time: the same command goes on with the certificates.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of finalize.py")
    parser.add_argument(
        "--noisy", type=shared_options.whole(1), default=10_000, help="noisy test images on which labels are compared"
    )
    parser.add_argument("--images", type=shared_options.whole(1), default=100, help="test images to certify, evenly spread")
    parser.add_argument("--n", type=shared_options.whole(10), default=1_000, help="noise samples that count a class")
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of the noise")
    parser.add_argument("--output", type=Path, default=Path("experiments/results/export"), help="folder for figures and logs")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import tempfile
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import arq_env
from arq_env.certification import Cohen, certify
from arq_env.comparison import paired_difference, summarize
from arq_env.datasets import load_dataset
from arq_env.datasets.augment import add_noise, as_tensor, to_float
from arq_env.export.agreement import explain
from arq_env.export.loading import input_shape_of, load_with_card
from arq_env.export.onnx_export import save_onnx
from arq_env.export.packed import save_packed
from arq_env.quantization.exact import exact_means
from arq_env.quantization.integer import integer_kernels, integer_network
from arq_env.support.files import write_json
from arq_env.support.provenance import EXPORT_PACKAGES, provenance

BATCH = 32


def main(options):
    for run in options.runs:
        network, card = load_with_card(run)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            files = {"onnx": save_onnx(network, folder / "network.onnx", card, input_shape=input_shape_of(card))}
            files["integer"] = save_onnx(
                network, folder / "network.integer.onnx", card, input_shape=input_shape_of(card), integers=True
            )
            save_packed(network, folder / "network.arq.safetensors", card)
            sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            unpacked = arq_env.load(folder / "network.arq.safetensors")
        test = load_dataset(card["dataset"]).test
        document = {
            "network": {key: card[key] for key in ("map", "network", "dataset", "sigma", "training", "digest")},
            "bytes": sizes | {"fp32": fp32_bytes(network)},
            "labels": {name: compare_labels(unpacked, file, test, card["sigma"], options) for name, file in files.items()},
            "certificates": compare_certificates(unpacked, files["onnx"], test, card["sigma"], options.output / run.name, options),
            "seed": options.seed,
            "provenance": provenance(EXPORT_PACKAGES),
        }
        write_json(options.output / f"{run.name}.json", document)
        for name, labels in document["labels"].items():
            print(
                f"{run.name}, {name}: {labels['agreement']:.4%} of {labels['images']} labels agree, "
                f"{labels['explained']} of {labels['disagreements']} disagreements explained"
            )


def fp32_bytes(network) -> int:
    """Four bytes for every weight and everything else that the network holds, steps of quantization aside."""
    held = {name: tensor for name, tensor in network.state_dict().items() if not name.endswith(("weight_step", "activation_step"))}
    return 4 * sum(tensor.numel() for tensor in held.values() if tensor.dtype != torch.int64)


def compare_labels(network, file, test, sigma, options) -> dict:
    """Labels of noisy test images by both, and each disagreement explained."""
    generator, agreed, found = np.random.Generator(np.random.SFC64(options.seed)), 0, []
    starts = range(0, options.noisy, BATCH)
    for start in tqdm(starts, desc=f"labels, {file.card['arithmetic']}"):
        rows = np.arange(start, min(start + BATCH, options.noisy)) % len(test.images)
        images = add_noise(to_float(as_tensor(test.images[rows])), sigma, generator)
        with torch.inference_mode(), exact_means():
            here = network(images).argmax(1).numpy()
        differing = here != file(images).argmax(1)
        agreed += int((~differing).sum())
        found += [explain(network, file, image[None]) for image in images[torch.from_numpy(differing)]]
    return {
        "images": options.noisy,
        "agreement": agreed / options.noisy,
        "disagreements": len(found),
        "explained": sum(disagreement.explained for disagreement in found),
        "causes": [disagreement._asdict() for disagreement in found],
    }


def compare_certificates(network, file, test, sigma, folder, options) -> dict:
    """Cohen's certificates of the PyTorch network and of the file, on the same images and noise."""
    chosen = slice(None, None, max(1, len(test.images) // options.images))
    images, labels, tables = to_float(as_tensor(test.images[chosen])), test.labels[chosen], {}
    for name, classifier in {"pytorch": integer_network(network) if integer_kernels() else network, "onnx": file}.items():
        tables[name] = certify(
            classifier,
            images,
            labels,
            sigma=sigma,
            n=options.n,
            seed=options.seed,
            method=Cohen(skip_wrong=True),
            progress=partial(tqdm, desc=f"certifying, {name}"),
            log=folder / f"{name}-images{len(labels)}-n{options.n}.tsv",
        )
    difference, error = paired_difference(tables["onnx"], tables["pytorch"])
    same = (tables["onnx"].prediction == tables["pytorch"].prediction).mean()
    return {
        "images": len(labels),
        "n": options.n,
        **{name: summarize(table) for name, table in tables.items()},
        "acr_difference": {"mean": difference, "standard_error": error},
        "same_prediction": float(same),
    }


if __name__ == "__main__":
    command_line.run(main, options)
