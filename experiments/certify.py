"""Certify a classifier on test images: a finished network, a file that export.py wrote, any ONNX file, or a torch module.

Stop it at any time: the same command goes on, from a log that belongs to this classifier and these settings.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "classifier",
        metavar="PATH",
        help="run folder of finalize.py, .safetensors or .onnx file; or module:function, which returns a torch module",
    )
    parser.add_argument(
        "--data",
        help="cifar10, signs, imagenet, a folder with test/ or val/, .npz file or module:function (default: what the file was "
        "finished on)",
    )
    parser.add_argument(
        "--image-size", type=shared_options.whole(1), metavar="PIXELS", help="scale and cut a folder's images to this edge"
    )
    parser.add_argument(
        "--sigma", type=float, help="standard deviation of the noise, in units of pixels in [0, 1] (default: the file's)"
    )
    shared_options.add_test_settings(parser)
    parser.add_argument("--method", choices=("cohen", "randomized", "sequential"), default="cohen", help="see docs/certifier.md")
    parser.add_argument(
        "--grid",
        type=shared_options.whole(1, 256),
        metavar="STEPS",
        help="draw the noise in so many steps a pixel value (1 will do), for a certificate of what is computed, rounding "
        "included; for quantized networks and ONNX files on integers (default: noise in float32)",
    )
    parser.add_argument("--base", metavar="MODULE:FUNCTION", help="for weights of a network of your own: one of the same structure")
    parser.add_argument(
        "--integer", action="store_true", help="a quantized torch network on integer kernels (needs an x86 CPU with AVX2)"
    )
    shared_options.add_engine(parser, "images")
    parser.add_argument("--device", default="cpu", help="of a torch module, cpu or cuda; ONNX runs on the CPU")
    parser.add_argument("--output", type=Path, help="folder for the log and the figures (default: runs/certify and a name)")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import dataclasses
import re
import warnings
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env.certification import Cohen, GridNoise, Randomized, Sequential, certify
from arq_env.certification.digest import classifier_digest
from arq_env.comparison import summarize
from arq_env.datasets import load_dataset
from arq_env.datasets.augment import as_tensor, to_float
from arq_env.export.loading import import_network, load_with_card
from arq_env.problem import check_device
from arq_env.quantization import integer_network
from arq_env.quantization.exact import ExactNetwork
from arq_env.support.errors import ArqError
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance
from arq_env.support.settings import TestSettings

#: By which images of a wrong class cost little; no figure changes by it.
METHODS = {"cohen": Cohen(skip_wrong=True), "randomized": Randomized(skip_wrong=True), "sequential": Sequential()}


def main(options):
    classifier, card = chosen_classifier(options)
    data = options.data or card.get("dataset")
    if data is None:
        raise ArqError("the file does not say on what images: give --data")
    if card.get("dataset") not in (None, data):
        warnings.warn(f"the network was finished on {card['dataset']}, and these are images of {data}", stacklevel=1)
    dataset = load_dataset(data, image_size=options.image_size)
    test = dataset.test
    images = to_float(as_tensor(test.images[options.offset :: options.every]))
    if not len(images):
        raise ArqError(f"test images from index {options.offset} were asked for: there are {len(test.images)}")
    if options.grid is not None:
        classifier = exact(classifier, options, tuple(images.shape[1:]))
    check_classes(classifier, images[:2], options.device, dataset.classes)
    sigma = card.get("sigma") if options.sigma is None else options.sigma
    if sigma is None:
        raise ArqError("the file does not say for which noise it is: give --sigma")
    settings = TestSettings(options.every, options.offset, options.n0, options.n, options.alpha, options.seed)
    digest = classifier_digest(classifier)
    grid = "" if options.grid is None else f"-grid{options.grid}"
    folder = (
        options.output
        or Path("runs/certify") / f"{re.sub('[^a-zA-Z0-9_.-]+', '-', data)}-sigma{sigma:g}{grid}-{options.method}-{digest[:12]}"
    )
    name = f"certificates-every{settings.every}-offset{settings.offset}-n{settings.n}"
    with engine_of(options) as engine:
        certificates = certify(
            classifier,
            images,
            test.labels[settings.offset :: settings.every],
            sigma=sigma,
            n0=settings.n0,
            n=settings.n,
            alpha=settings.alpha,
            seed=settings.seed,
            method=METHODS[options.method],
            noise=None if options.grid is None else GridNoise(options.grid),
            map=engine.map,
            progress=partial(tqdm, desc="certifying"),
            log=folder / f"{name}.tsv",
        )
    document = {
        "classifier": {**{key: card[key] for key in ("map", "network", "training", "arithmetic") if key in card}, "digest": digest},
        "data": data,
        "sigma": sigma,
        "method": options.method,
        "grid": options.grid,
        "settings": dataclasses.asdict(settings),
        "images": len(certificates),
        **summarize(certificates),
        "provenance": provenance(),
    }
    write_json(folder / f"{name}.json", document)
    print(
        f"ACR {document['acr']:.4f} +- {document['acr_standard_error']:.4f}, clean accuracy {document['clean_accuracy']:.3f}, "
        f"{len(certificates)} test images of {data}\n{folder / name}.json"
    )


def chosen_classifier(options):
    """What to certify, on its device, and what its file says of it."""
    check_device(options.device)
    if ":" in options.classifier and not Path(options.classifier).exists():
        classifier, card = import_network(options.classifier), {}
    else:
        base = None if options.base is None else import_network(options.base)
        classifier, card = load_with_card(Path(options.classifier), base)
    if isinstance(classifier, torch.nn.Module):
        classifier = classifier.to(options.device)
        return (integer_network(classifier) if options.integer and options.grid is None else classifier), card
    if options.integer or options.device != "cpu":
        raise ArqError("ONNX Runtime runs here on the CPU, as the file says: leave out --integer and --device")
    return classifier, card


def exact(classifier, options, shape):
    """The classifier as one function of an image, for noise on a grid."""
    if isinstance(classifier, torch.nn.Module):
        classifier = ExactNetwork(classifier, shape)
        return integer_network(classifier) if options.integer else classifier
    if not getattr(classifier, "exact", False):
        raise ArqError("this is not known to give an image the same class in any batch: for --grid give an ONNX file on integers")
    return classifier


def check_classes(classifier, images, device, classes):
    """Refuse images of other classes than the classifier's, as far as their number tells."""
    with torch.inference_mode():  # what is no torch module gets NumPy arrays, as from certify
        shape = np.shape(classifier(images.to(device) if isinstance(classifier, torch.nn.Module) else images.numpy()))
    if len(shape) == 2 and shape[1] != len(classes):
        raise ArqError(f"the classifier tells {shape[1]} classes apart, and the images have {len(classes)}: give its own --data")


if __name__ == "__main__":
    command_line.run(main, options)
