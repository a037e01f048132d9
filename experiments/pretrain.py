"""Train a network under Gaussian noise, with or without consistency regularisation, and write its checkpoint: weights and card.

Stop it at any time; the same command goes on after the last finished epoch.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    from arq_env.networks.recipe import Recipe
    from arq_env.registration import DEFAULT, ENVIRONMENTS

    parser = command_line.parser(__doc__)
    shared_options.add_problem(parser, trained=False)
    parser.set_defaults(**ENVIRONMENTS[DEFAULT])
    parser.add_argument("--sigma", type=float, default=Recipe.sigma, help="standard deviation of the noise, pixels in [0, 1]")
    parser.add_argument(
        "--training", default="gaussian", choices=("gaussian", "consistency"), help="method, which becomes part of the name"
    )
    parser.add_argument(
        "--start",
        metavar="NAME",
        help="start from these weights: a shipped checkpoint, such as resnet20-cifar10-sigma0.5-gaussian, or a .safetensors file",
    )
    parser.add_argument("--epochs", type=shared_options.whole(1), default=Recipe.epochs, help="passes over the training images")
    parser.add_argument(
        "--cycles", type=shared_options.whole(1), default=Recipe.cycles, help="times the learning rate rises and falls"
    )
    parser.add_argument("--batch", type=shared_options.whole(1), default=Recipe.batch, help="images a step")
    shared_options.add_at_once(parser)
    parser.add_argument("--peak-rate", type=float, default=Recipe.peak_rate, help="highest learning rate of the cycle")
    parser.add_argument("--weight-decay", type=float, default=Recipe.weight_decay, help="L2 penalty of SGD")
    parser.add_argument(
        "--seed", type=shared_options.whole(0), default=Recipe.seed, help="decides initial weights, order, crops and noise"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default=Recipe.precision,
        help="arithmetic of the training passes; weights stay float32",
    )
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler; about 1.3 times as fast)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/pretrain"),
        help="folder for the checkpoint, the state to resume from and TensorBoard",
    )
    return parser.parse_args()


options = command_line.start(__name__, parse)

import dataclasses

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from arq_env.datasets import load_dataset
from arq_env.networks.checkpoints import SHIPPED, Checkpoint, build_network, load_weights, save_checkpoint
from arq_env.networks.recipe import Recipe, training_method
from arq_env.networks.training import batches_per_epoch, noisy_accuracy, train
from arq_env.problem import check_device
from arq_env.support.files import writing
from arq_env.support.provenance import provenance


def main(options):
    torch.manual_seed(options.seed)
    own = shared_options.own_arguments(options)
    network, start = build_network(own.pop("network"), own.pop("network_arguments", None)), ""
    if options.start:
        path = Path(options.start) if options.start.endswith(".safetensors") else SHIPPED / f"{options.start}.safetensors"
        start = load_weights(network, path)["digest"]
    fields = {field.name for field in dataclasses.fields(Recipe)}
    chosen = {name: value for name, value in vars(options).items() if name in fields and name != "start"}
    recipe = Recipe(**chosen, **training_method(options.training, options.sigma), start=start)
    checkpoint = Checkpoint(options.network, options.data, options.sigma, options.training)
    folder = options.output / checkpoint.name
    check_device(options.device)
    dataset = load_dataset(**own)
    batches = batches_per_epoch(dataset, recipe)

    with writing(folder / "tensorboard"):
        writer = SummaryWriter(folder / "tensorboard")
    with tqdm(total=recipe.epochs * batches, unit="batch", mininterval=1.0) as bar:

        def on_epoch(record):
            bar.n = record["epoch"] * batches
            bar.write(" ".join(f"{key} {value:.4g}" for key, value in record.items()))
            for key, value in record.items():
                writer.add_scalar(f"pretrain/{key}", value, record["epoch"])

        history = train(
            network,
            dataset,
            recipe,
            folder,
            device=options.device,
            compile=options.compile,
            at_once=options.at_once,
            on_batch=bar.update,
            on_epoch=on_epoch,
        )
    writer.close()
    accuracy = noisy_accuracy(network, *dataset.test, sigma=recipe.sigma)
    card = {
        "network": options.network,
        "dataset": options.data,
        "sigma": recipe.sigma,
        "training": checkpoint.training,
        "recipe": dataclasses.asdict(recipe),
        "accuracy_under_noise": {"test": accuracy, "held_out": history[-1]["held_out_accuracy"]},
        **provenance(),
    }
    card = save_checkpoint(network, checkpoint.path(folder), card)
    print(f"accuracy on single noisy test images {accuracy:.4f}\n{checkpoint.path(folder)} (SHA-256 {card['digest'][:12]}...)")


if __name__ == "__main__":
    command_line.run(main, options)
