"""Train one network for every bit-width map, from which any map is then quantized without training of its own.

Weights are shared by all bit-widths, and each bit-width of each place has step sizes of its own; each step adds up the gradients
of a few maps. Give the file to the searches as --weights. Stop it at any time: the same command goes on after the last finished
epoch.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    from arq_env.networks.recipe import finetuning_recipe

    parser = command_line.parser(__doc__)
    shared_options.add_environment(parser, training="consistency", weights=False)
    group = parser.add_argument_group("the training")
    group.add_argument("--low", type=float, default=0.0046, help="smallest budget of a map, as a fraction of FP32's bit operations")
    group.add_argument("--high", type=float, default=0.03, help="largest budget")
    group.add_argument(
        "--maps",
        type=shared_options.whole(0),
        default=2,
        help="maps of drawn budgets in a step, beside the fewest and the most bits",
    )
    shown = finetuning_recipe(0.5)
    for name, kind, what in (
        ("epochs", shared_options.whole(1), "passes over the images of an epoch"),
        ("batch", shared_options.whole(1), "images a step"),
        ("peak-rate", float, "highest learning rate of the cycle"),
        ("seed", shared_options.whole(0), "of order, crops, noise and maps"),
    ):
        group.add_argument(f"--{name}", type=kind, default=getattr(shown, name.replace("-", "_")), help=what)
    shared_options.add_precision(group)
    group.add_argument(
        "--epoch-images",
        type=shared_options.whole(0),
        default=shown.images,
        metavar="N",
        help="training images an epoch, drawn anew for each; 0 for all",
    )
    shared_options.add_at_once(group)
    group.add_argument("--output", type=Path, default=Path("runs/any-bits"), help="folder for the file, state and TensorBoard")
    return parser.parse_args()


options = command_line.start(__name__, parse)

import dataclasses

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from arq_agents.any_bits import train_any_bits
from arq_agents.any_budget import check_budgets
from arq_agents.main import make_env
from arq_env.env import arq_env_of
from arq_env.networks.recipe import finetuning_recipe
from arq_env.networks.training import batches_per_epoch
from arq_env.quantization.any_bits import save_any_bits
from arq_env.support.files import writing
from arq_env.support.machine import fastest_precision
from arq_env.support.provenance import provenance


def main(options):
    options.budget = options.high
    env = arq_env_of(make_env(options))
    check_budgets(env.default_budget, options.low, options.high)  # mistakes first
    problem, folder = env.problem, options.output
    changes = {name: getattr(options, name) for name in ("epochs", "batch", "peak_rate", "seed")}
    precision = fastest_precision(options.device) if options.precision == "auto" else options.precision
    recipe = finetuning_recipe(problem.sigma, images=options.epoch_images, precision=precision, start=problem.start, **changes)
    with writing(folder / "tensorboard"):
        writer = SummaryWriter(folder / "tensorboard")
    with tqdm(total=recipe.epochs * batches_per_epoch(problem.dataset, recipe), unit="batch") as bar:

        def on_epoch(record):
            bar.write(" ".join(f"{key} {value:.4g}" for key, value in record.items()))
            for key, value in record.items():
                writer.add_scalar(f"any_bits/{key}", value, record["epoch"])

        network, records = train_any_bits(
            env,
            recipe,
            folder,
            budgets=(options.low, options.high),
            maps=options.maps,
            at_once=options.at_once,
            on_batch=bar.update,
            on_epoch=on_epoch,
        )
    writer.close()
    card = {key: problem.card.get(key) for key in ("network", "dataset", "sigma", "training")}
    card |= {
        "base": problem.base_digest,
        "checkpoint": problem.card.get("digest"),
        "recipe": dataclasses.asdict(recipe),
        "budgets": [options.low, options.high],
    }
    kept = {name: value for name, value in records[-1].items() if name.startswith("acr_")}
    save_any_bits(network, folder / "weights.safetensors", card | {"maps": options.maps, "kept": kept} | provenance())
    print(f"of FP32's ACR on reward images: {', '.join(f'{name[4:]} {share:.3f}' for name, share in kept.items())}")
    print(f"{folder / 'weights.safetensors'}: give it as --weights")


if __name__ == "__main__":
    command_line.run(main, options)
