"""Certify shipped FP32 networks on test images and print the table of references.

Stop it at any time: every image that is done is in the TSV table of its network, and the same command goes on there.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="shipped checkpoints, such as resnet20-cifar10-sigma0.5-gaussian; all by default"
    )
    shared_options.add_test_settings(parser)
    shared_options.add_protocol(parser)
    parser.add_argument(
        "--compile", action="store_true", help="compile the network first (needs a C++ compiler; pays for n = 1,000)"
    )
    shared_options.add_engine(parser, "images")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("runs/references"), help="folder for tables and figures")
    return shared_options.by_protocol(parser.parse_args())


options = command_line.start(__name__, parse)

import json
from dataclasses import asdict
from functools import partial

from tqdm import tqdm

from arq_agents.main import engine_of
from arq_env import ArqError
from arq_env.certification import CompiledNetwork, estimate_seconds
from arq_env.comparison import TestSettings, certify_on_test_images, summarize
from arq_env.networks.checkpoints import shipped
from arq_env.problem import load_problem
from arq_env.report.tables import reference_table
from arq_env.support.files import write_json
from arq_env.support.provenance import provenance


def main(options):
    settings = TestSettings(options.every, options.offset, options.n0, options.n, options.alpha, options.seed)
    there = {checkpoint.name: checkpoint for checkpoint in shipped()}
    for name in options.names or there:
        if name not in there:
            raise ArqError(f"there is no checkpoint {name} (there: {', '.join(there)}): choose one of them")
    with engine_of(options) as engine:
        for name in options.names or there:
            certify_one(there[name], settings, options, engine)
    documents = [json.loads(path.read_text()) for path in sorted(options.output.glob("*-n*.json")) if ".settings" not in path.name]
    print(reference_table(documents))


def certify_one(checkpoint, settings, options, engine):
    """Write ``NAME-nN.tsv``, image by image, and ``NAME-nN.json``, the figures."""
    problem = load_problem(
        checkpoint.network, checkpoint.dataset, sigma=checkpoint.sigma, training=checkpoint.training, device=options.device
    )
    stem = options.output / f"{checkpoint.name}-n{settings.n}{options.ending}"
    images, _ = problem.test_images(settings.every, settings.offset)
    network = CompiledNetwork(problem.network) if options.compile else problem.network
    seconds = estimate_seconds(network, images, n0=settings.n0, n=settings.n) / engine.workers
    print(f"{checkpoint.name}, n = {settings.n}: about {seconds / 60:.1f} minutes for {len(images)} images")
    table = certify_on_test_images(
        problem,
        network,
        settings,
        skip_wrong=False,  # the reference's table is a whole one
        map=engine.map,
        progress=partial(tqdm, desc=checkpoint.name),
        log=stem.with_name(stem.name + ".tsv"),
    )
    document = {
        "checkpoint": checkpoint.name,
        "digest": problem.card["digest"],
        "dataset": checkpoint.dataset,
        "sigma": checkpoint.sigma,
        "training": checkpoint.training,
        "images": len(table),
        "settings": asdict(settings),
        **summarize(table),
        "minutes": float(table.seconds.sum()) / 60,
        "provenance": provenance(),
    }
    write_json(stem.with_name(stem.name + ".json"), document)


if __name__ == "__main__":
    command_line.run(main, options)
