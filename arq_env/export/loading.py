"""One door for everything that can be certified: files by their content, code by its import string."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from arq_env.datasets import known_shape
from arq_env.export.packed import is_packed, load_packed
from arq_env.networks.checkpoints import build_network, card_path, channels_last, copy_network, load_weights
from arq_env.quantization.files import load_quantized
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import checked_path, read_json
from arq_env.support.imports import call_imported

#: The largest ONNX file, in bytes: the format itself has no larger ones.
MOST_BYTES = 2**31


def input_shape_of(card: dict) -> tuple[int, ...]:
    """The shape [c, h, w] of a network's images, as the card of its file says, or else the name of its data set.

    :raises ArqError: when neither does
    """
    if shape := card.get("input_shape") or known_shape(card.get("dataset", "")):
        return tuple(shape)
    raise ArqError("the network's card does not say what shape its images have: give --input-shape")


def load_with_card(path: Path, base: nn.Module | None = None) -> tuple[Callable, dict]:
    """What :func:`arq_env.load` returns, and what the file says of it.

    :param path, base: as for :func:`arq_env.load`
    :raises ArqError: as for :func:`arq_env.load`
    """
    path = checked_path("path", path)
    try:
        path = path / "network.safetensors" if path.is_dir() else path
        size = path.stat().st_size
        if path.suffix == ".onnx":
            from arq_env.export.runtime import OnnxClassifier

            if size >= MOST_BYTES:
                raise ArqError(f"{path} has {size:,} bytes: an ONNX file has less than {MOST_BYTES:,}")
            classifier = OnnxClassifier(path.read_bytes())
            return classifier, classifier.card
        if is_packed(path):
            return load_packed(path, base)
        if not card_path(path).exists():
            raise ArqError(f"{path} has no card ({card_path(path).name}) beside it: restore it, or give a packed file")
        card = read_json(card_path(path))
        if base is None and not card.get("network"):
            raise ArqError(f"{path} is of a network of somebody's own: give one of its structure (base, or --base)")
        if "layers" in card:
            return load_quantized(path, base)
        return _checkpoint(path, base)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, ArqError):
            raise
        raise ArqError(
            f"{path} cannot be loaded ({reason(error)}): give a run folder of finalize.py, a .safetensors or an .onnx file"
        ) from error


def _checkpoint(path: Path, base: nn.Module | None) -> tuple[nn.Module, dict]:
    """A network that is not quantized, and its card."""
    with torch.device("meta"):
        network = build_network(read_json(card_path(path))["network"]) if base is None else copy_network(base)
    card = load_weights(network, path)
    return channels_last(network.eval()), card


def import_network(name: str) -> Callable:
    """What the function returns that ``module:function`` names (:func:`arq_env.support.imports.call_imported`).

    :raises ArqError: where there is no such function, or it fails, or returns what cannot be called
    """
    try:
        network = call_imported(name)
    except ArqError:
        raise
    except Exception as error:  # whatever somebody's code raises when it is called
        raise ArqError(
            f"{name} cannot be used ({type(error).__name__}: {reason(error)}): give module:function of a network"
        ) from error
    if not callable(network):
        raise ArqError(f"{name} returns a {type(network).__name__}: let it return a torch module, or a function of images")
    return network.eval() if isinstance(network, nn.Module) else network
