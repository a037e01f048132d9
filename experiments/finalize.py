"""Turn a bit-width map into the finished network: fine-tune it under quantization and noise, certify it on test images.

The map is a run folder of a search, a bit_widths.json, found or edited by hand, or a name: W4A4 for uniform bits, FP32 to
fine-tune the base network by the same recipe. Stop it at any time: the same command goes on.
"""

import argparse
from pathlib import Path

from arq_agents import command_line, shared_options

#: Batches of fine-tuning from which compiling, a minute or so, pays.
COMPILED_BATCHES = 500


def parse():
    from arq_env.networks.recipe import finetuning_recipe
    from arq_env.registration import DEFAULT
    from arq_env.support.settings import UNIFORM

    parser = command_line.parser(__doc__)
    parser.add_argument("map", metavar="RUN", help="run folder, bit_widths.json, FP32, or uniform bits such as W4A4")
    parser.add_argument("--env", default=DEFAULT, help="id of the network and its data (a map's file decides for itself)")
    shared_options.add_problem(parser)
    shared_options.add_fix(parser)
    parser.sigma_of_own = True
    parser.add_argument(
        "--sigma", type=float, default=0.5, help="standard deviation of the noise (a map's file decides for itself)"
    )
    parser.add_argument("--training", default="gaussian", help="of the base network (a map's file decides for itself)")
    shown = finetuning_recipe(0.5)
    for name, kind, what in (
        ("epochs", shared_options.whole(1), "passes over the images of an epoch"),
        ("images", shared_options.whole(0), "training images an epoch, drawn anew for each; 0 for all"),
        ("batch", shared_options.whole(1), "images a step"),
        ("peak-rate", float, "highest learning rate of the cycle"),
        ("distillation", float, "weight of the base network's predictions, 0 to 1; the rest goes to the labels"),
        ("seed", shared_options.whole(0), "of order, crops and noise, in training and in certification"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(shown, name.replace("-", "_")), help=what)
    shared_options.add_precision(parser)
    shared_options.add_at_once(parser)
    parser.add_argument("--every", type=shared_options.whole(1), default=20, help="certify on every so many-th test image")
    parser.add_argument("--n", type=shared_options.whole(10), default=1_000, help="noise samples that count a class")
    shared_options.add_protocol(parser)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help=f"compile for training and certification (default: from {COMPILED_BATCHES} batches on, where there is a C++ compiler)",
    )
    parser.add_argument(
        "--integer",
        action=argparse.BooleanOptionalAction,
        help="certify a quantized network on integer kernels, which changes no label (default: on an x86 CPU)",
    )
    shared_options.add_engine(parser, "images to certify")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, help="folder for everything (default: RUN/final, or runs/final and a name)")
    given = parser.parse_args()
    if given.fix is not None and not UNIFORM.fullmatch(given.map):
        parser.error("--fix is for uniform bits, such as W4A4: a map's file says what is fixed, and FP32 has no bits")
    return shared_options.by_protocol(given)


options = command_line.start(__name__, parse)

import dataclasses
from functools import partial

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env import ArqError
from arq_env.bitwidths import bops_fraction, named_uniform, save_map
from arq_env.certification import CompiledNetwork
from arq_env.comparison import TestSettings, certify_on_test_images, summarize
from arq_env.evaluation import Evaluator
from arq_env.finishing import finish
from arq_env.networks.recipe import Recipe, finetuning_recipe
from arq_env.networks.training import batches_per_epoch
from arq_env.problem import load_mapped, load_problem
from arq_env.quantization import integer_network, model_bytes, save_quantized
from arq_env.quantization.integer import integer_kernels
from arq_env.registration import ENVIRONMENTS
from arq_env.report.tables import layer_table
from arq_env.rewards import CertifierSettings, settings_of
from arq_env.support.files import write_json, writing
from arq_env.support.machine import compiles, fastest_precision
from arq_env.support.provenance import provenance
from arq_env.support.settings import UNIFORM


def main(options):
    problem, bit_widths, name, found = chosen_map(options)
    searched = settings_of(found)
    folder = options.output or default_folder(options)
    evaluator = Evaluator(problem, CertifierSettings(images=searched.images, first=searched.first))
    what_is_fastest(options, problem)
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"sigma", "start"}
    changes = {field: value for field, value in vars(options).items() if field in fields}
    recipe = finetuning_recipe(problem.sigma, start=problem.start, **changes)
    if bit_widths is not None:
        print(layer_table(problem.layers, bit_widths), end="\n\n")

    with writing(folder / "tensorboard"):
        writer = SummaryWriter(folder / "tensorboard")
    with tqdm(total=recipe.epochs * batches_per_epoch(problem.dataset, recipe), unit="batch", desc=f"fine-tuning {name}") as bar:

        def on_epoch(record):
            bar.write(" ".join(f"{key} {value:.4g}" for key, value in record.items()))
            for key, value in record.items():
                writer.add_scalar(f"finetune/{key}", value, record["epoch"])

        network, records = finish(
            evaluator,
            bit_widths,
            recipe,
            folder,
            compile=options.compile,
            at_once=options.at_once,
            on_batch=bar.update,
            on_epoch=on_epoch,
        )
    writer.close()

    settings = TestSettings(options.every, n=options.n, seed=options.seed)
    with engine_of(options) as engine:
        certificates = certify_on_test_images(
            problem,
            for_certification(network, options, quantized=bit_widths is not None),
            settings,
            map=engine.map,
            progress=partial(tqdm, desc=f"certifying {name}"),
            log=folder / f"certificates-n{settings.n}{options.ending}.tsv",
        )
    document = {
        "map": name,
        **{key: problem.card[key] for key in ("network", "dataset", "sigma", "training")},
        "input_shape": list(problem.dataset.image_shape),
        "checkpoint": problem.card["digest"],
        "bops_fraction": 1.0 if bit_widths is None else bops_fraction(bit_widths, problem.layers),
        "model_bytes": model_bytes(problem.network, problem.layers, bit_widths),
        "recipe": dataclasses.asdict(recipe),
        "parts_of_a_batch": records[-1].get("parts_of_a_batch", 1),
        "held_out_acr": records[-1]["held_out_acr"],
        "images": len(certificates),
        "settings": dataclasses.asdict(settings),
        "integer_kernels": options.integer and bit_widths is not None,
        **summarize(certificates),
    }
    saved = save_quantized(network, folder / "network.safetensors", document | provenance())
    if bit_widths is not None:
        header = {key: document[key] for key in ("network", "dataset", "sigma")}
        header["budget"] = document["bops_fraction"] if found.get("budget") is None else found["budget"]
        made = provenance() | problem.origin
        save_map(
            folder / "bit_widths.json",
            bit_widths,
            problem.layers,
            **header,
            metrics={"acr": document["acr"]},
            provenance=made,
        )
    write_json(
        folder / f"summary-n{settings.n}{options.ending}.json", document | {"digest": saved["digest"], "provenance": provenance()}
    )
    print(
        f"{name}: ACR {document['acr']:.4f} +- {document['acr_standard_error']:.4f}, "
        f"clean accuracy {document['clean_accuracy']:.3f}, {document['bops_fraction']:.3%} of FP32's bit operations, "
        f"{document['model_bytes']:,} bytes\n{folder}"
    )


def what_is_fastest(options, problem):
    """Settle the options that are left to the machine, and say how."""
    if options.precision == "auto":
        options.precision = fastest_precision(options.device)
    if options.integer is None:
        options.integer = problem.device.type == "cpu" and integer_kernels()
    if options.compile is None:
        batches = options.epochs * -(-(options.images or len(problem.dataset.train.images)) // options.batch)
        options.compile = batches >= COMPILED_BATCHES and compiles()
    chosen = [options.precision] + [name for name in ("compile", "integer") if getattr(options, name)]
    print(f"on this machine: {', '.join(chosen)} (set by --precision, --[no-]compile, --[no-]integer)")


def chosen_map(options):
    """The problem, the map (None for FP32), what to call it, and the other entries of its file."""
    if options.map == "FP32" or UNIFORM.fullmatch(options.map):
        problem = problem_of(options)
        fixed = [f"{name}={bits}" for name, bits in options.fix.items()] or ["nothing fixed"] if options.fix is not None else []
        return problem, named_uniform(options.map, problem.layers), ", ".join([options.map, *fixed]), {}
    problem, bit_widths, document, path = load_mapped(Path(options.map), options.device)
    return problem, bit_widths, path.parent.name if path.name == "bit_widths.json" else path.stem, document


def problem_of(options):
    """The problem that the command line names, where no map's file does."""
    if options.env not in ENVIRONMENTS:
        raise ArqError(f"there is no environment {options.env}: choose one of {', '.join(ENVIRONMENTS)}")
    named = {name: value for name, value in ENVIRONMENTS[options.env].items() if name in shared_options.OWN}
    arguments = named | shared_options.own_arguments(options)
    if missing := [name for name in ("network", "data") if name not in arguments]:
        raise ArqError(f"{options.env} has no {missing[0]} of its own: give --{missing[0]}")
    return load_problem(**arguments, sigma=options.sigma, training=options.training, fix=options.fix, device=options.device)


def for_certification(network, options, *, quantized: bool):
    """The network in the form that was asked for: on integers, compiled, both or neither."""
    integer = options.integer and quantized
    if integer:
        network = integer_network(network)
    return CompiledNetwork(network, batch_size=32 if integer else 16) if options.compile else network


def default_folder(options) -> Path:
    """Beside the map; or in ``runs``, by what was asked for."""
    path = Path(options.map)
    if path.exists():
        return (path if path.is_dir() else path.parent) / "final"
    own = shared_options.own_arguments(options)
    what = "" if "network" in own or "data" in own else ENVIRONMENTS[options.env].get("data", options.env)
    what = (what + shared_options.label(options)).removeprefix("-")
    return Path("runs/final") / f"{what}-sigma{options.sigma:g}-{options.training}-{options.map}"


if __name__ == "__main__":
    command_line.run(main, options)
