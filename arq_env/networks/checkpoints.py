"""Networks by name and their trained weights: one safetensors file and one JSON card each."""

import copy
import re
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from arq_env.networks.mobilenet import mobilenetv2
from arq_env.networks.resnet import resnet20, resnet32
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import atomic_file, read_json, sha256, write_json
from arq_env.support.imports import call_imported

NETWORKS = {"resnet20": resnet20, "resnet32": resnet32, "mobilenetv2": mobilenetv2}
SHIPPED = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Checkpoint:
    """Which weights: a network trained on a data set under noise ``sigma`` by a training method."""

    network: str
    dataset: str
    sigma: float
    training: str = "gaussian"

    @property
    def name(self) -> str:
        """As its files are called, without their suffix."""
        network, dataset = (re.sub(r"[^\w.]+", "-", part).strip("-") for part in (self.network, self.dataset))
        return f"{network}-{dataset}-sigma{self.sigma:g}-{self.training}"

    def path(self, folder: Path = SHIPPED) -> Path:
        """Where its weights lie."""
        return Path(folder) / f"{self.name}.safetensors"


def shipped(folder: Path = SHIPPED) -> list[Checkpoint]:
    """The checkpoints in a folder, by network, data set, sigma and training."""
    cards = (read_json(card_path(path)) for path in Path(folder).glob("*.safetensors"))
    checkpoints = [Checkpoint(card["network"], card["dataset"], card["sigma"], card["training"]) for card in cards]
    return sorted(checkpoints, key=lambda c: (c.network, c.dataset, c.sigma, c.training == "consistency"))


def build_network(name: str, arguments: dict | None = None) -> torch.nn.Module:
    """An untrained network, with initial weights from torch's global generator; by import string whatever the function returns.

    :param name: of a network of this package, or ``"module:function"``
    :param arguments: keyword arguments for the function
    :raises ArqError: for an unknown name, a function that is not there, and one that returns no module
    """
    if ":" in name:
        network = call_imported(name, arguments)
        if not isinstance(network, torch.nn.Module):
            raise ArqError(f"{name} gave {type(network).__name__!r}: let it return a torch.nn.Module")
        return network
    if name not in NETWORKS:
        raise ArqError(f"there is no network {name!r}: choose one of {', '.join(NETWORKS)}, or give module:function")
    if arguments:
        raise ArqError(f"{name} takes no arguments: leave out network_arguments")
    return NETWORKS[name]()


def save_checkpoint(network: torch.nn.Module, path: Path, card: dict) -> dict:
    """Write ``path`` (float32 weights) and its card beside it; return the card with the file's ``digest`` (SHA-256)."""
    state = network.state_dict()
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArqError(f"the network's state has {name!r}, which is no tensor and cannot be written: keep it out of the state")
    # Clones, since the format takes no two tensors of one memory, such as those of a module that has two names.
    data = save({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()})
    card = card | {"digest": sha256(data)}
    with atomic_file(path) as file:
        file.write(data)
    write_json(card_path(path), card)
    return card


def card_path(path: Path) -> Path:
    """Where the card of a file of weights is: ``.json`` in the place of ``.safetensors``, after any other name."""
    path = Path(path)
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path.with_name(f"{path.name}.json")


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and card of a file that :func:`save_checkpoint` wrote; what reading raises is left to the caller.

    :raises ArqError: when the bytes are not those the card was written for
    """
    path = Path(path)
    card, data = read_json(card_path(path)), path.read_bytes()
    if sha256(data) != card["digest"]:
        raise ArqError(f"{path} is damaged (SHA-256 differs from its card's): restore it or make it again")
    return load(data), card


def give_state(network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Give ``network`` the tensors of a file, checked by name, shape and dtype; what loading raises is left to the caller.

    The version that a module gives its state is not in the file, so it is taken to be the module's own.

    :raises ArqError: naming a tensor that has another dtype, or NaN
    """
    own = network.state_dict()
    for name, tensor in state.items():
        if name in own and tensor.dtype != own[name].dtype:
            raise ArqError(f"{name} is {tensor.dtype} in the file and {own[name].dtype} in the network: make the file again")
        if tensor.is_floating_point() and tensor.isnan().any():
            raise ArqError(f"{name} holds NaN: make the file again")
    versioned = OrderedDict(state)
    versioned._metadata = own._metadata  # type: ignore[attr-defined]  # where torch keeps versions
    network.load_state_dict(versioned, assign=True)


def channels_last(network: torch.nn.Module) -> torch.nn.Module:
    """The network laid out as convolutions of images are fastest, in place; as it is where a weight has five dimensions."""
    if all(tensor.dim() != 5 for tensor in (*network.parameters(), *network.buffers())):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own types leave it out
    return network


def copy_network(network: torch.nn.Module) -> torch.nn.Module:
    """A deep copy, also where modules hold features of their last forward pass, which torch refuses to copy."""
    kept = [value for module in network.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return copy.deepcopy(network, {id(value): value.detach() for value in kept if not value.is_leaf})


def load_checkpoint(checkpoint: Checkpoint, folder: Path = SHIPPED) -> tuple[torch.nn.Module, dict]:
    """Return the network in evaluation mode, channels-last, and its card.

    :raises ArqError: when there is no such checkpoint, or its bytes are not those the card was written for
    """
    with torch.device("meta"):  # no initial weights, which would advance the global generator
        network = build_network(checkpoint.network)
    card = load_weights(network, checkpoint.path(folder))
    return channels_last(network.eval()), card


def load_weights(network: torch.nn.Module, path: Path) -> dict:
    """Give ``network`` the weights in ``path`` and return their card.

    :raises ArqError: when there is no such file, it is not what its card was written for, or is another network's
    """
    path = Path(path)
    if not path.exists() or not card_path(path).exists():
        there = sorted(p.stem for p in path.parent.glob("*.safetensors")) or ["none"]
        raise ArqError(
            f"there is no checkpoint {path.stem} (there: {', '.join(there)}): choose one, or train it with experiments/pretrain.py"
        )
    try:
        state, card = read_weights(path)
        give_state(network, state)
    except ArqError:
        raise
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ArqError(
            f"{path} cannot be loaded ({reason(error)}): restore it or train it again with experiments/pretrain.py"
        ) from error
    return card
