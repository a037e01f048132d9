"""Networks of one's own: built by a function, with the weights of a file in any of the layouts that checkpoints come in."""

import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from arq_env.certification import network_digest
from arq_env.networks.checkpoints import build_network, channels_last, give_state
from arq_env.networks.resnet import Normalize
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import sha256

#: Mean and standard deviation of each channel.
Normalization = Sequence[Sequence[float]]
State = dict[str, torch.Tensor]
#: What older versions of BatchNorm did not keep, and nothing computes with in evaluation mode.
UNUSED = "num_batches_tracked"


def load_own(
    network: str, arguments: dict | None = None, checkpoint: str | None = None, normalize: Normalization | None = None
) -> tuple[nn.Module, str]:
    """The network in evaluation mode, channels-last, and the SHA-256 of its checkpoint, or, where there is none, of itself.

    torch's global generator is left as it was.

    :param network: ``"module:function"``, or the name of an architecture of this package
    :param arguments: keyword arguments for the function
    :param checkpoint: file of weights, see :func:`read_state`; without one the function must return a trained network
    :param normalize: mean and standard deviation of each channel, in units of pixels in [0, 1], which are put before the network
    :raises ArqError: when there is no such network or file, it returns no module, the weights are not its own, or are random
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        module = build_network(network, arguments)
        if checkpoint is None:
            torch.default_generator.manual_seed(1)
            if network_digest(build_network(network, arguments)) != network_digest(module):
                raise ArqError(f"the weights of {network} are drawn at random: give the checkpoint that it was trained to")
            digest = ""
        else:
            state, digest = read_state(checkpoint)
            normalize = _give(module, state, checkpoint, normalize)
    if normalize is not None:
        module = normalized(module, normalize)
    module = channels_last(module.eval())
    return module, digest or network_digest(module)


def normalized(network: nn.Module, normalize: Normalization) -> nn.Module:
    """The network behind a normalisation of its images, as one module of two: ``normalize`` and ``network``.

    :raises ArqError: unless mean and standard deviation are one finite number a channel, the latter positive
    """
    try:
        mean, std = (tuple(float(value) for value in values) for values in normalize)
    except (TypeError, ValueError) as error:
        raise ArqError(
            f"normalize is {normalize!r}: give two lists, the mean and the standard deviation of each channel"
        ) from error
    if len(mean) != len(std) or not mean or not all(map(math.isfinite, mean)) or not all(0 < value < math.inf for value in std):
        raise ArqError(f"normalize is {normalize!r}: give one mean and one positive standard deviation for each channel")
    both = nn.Sequential()
    both.add_module("normalize", Normalize(mean, std))
    both.add_module("network", network)
    return both


def read_state(path: str) -> tuple[State, str]:
    """The tensors in a file by their names, and its SHA-256.

    It is a ``.safetensors`` file, or one of ``torch.save``, read with ``weights_only=True``: a state, or a dictionary with one
    state among its entries, such as ``{"arch", "epoch", "state_dict"}``.

    :raises ArqError: when it is none of these
    """
    file = Path(os.path.expanduser(path))
    try:
        data = file.read_bytes()
        content = load_safetensors(data) if file.suffix == ".safetensors" else _load_pickled(file)
    except (OSError, ValueError, RuntimeError, TypeError, EOFError, KeyError, SafetensorError) as error:
        raise ArqError(
            f"{path} cannot be read as weights ({reason(error)}): give a .safetensors file, or one of torch.save"
        ) from error
    if _is_state(content):
        return dict(content), sha256(data)
    states = {key: value for key, value in content.items() if _is_state(value)} if isinstance(content, Mapping) else {}
    chosen = "state_dict" if "state_dict" in states or len(states) != 1 else next(iter(states))
    if chosen not in states:
        there = f"there are {', '.join(map(str, states))}" if states else "there is none"
        raise ArqError(f"{path} holds no one set of weights ({there}): save the network's state_dict()")
    return dict(states[chosen]), sha256(data)


def _load_pickled(file: Path):
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"it holds more than weights, or is damaged: {str(error).splitlines()[0]}") from error


def _is_state(value) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _give(module: nn.Module, state: State, path: str, normalize: Normalization | None) -> Normalization | None:
    """Give the module the weights, whatever is wrapped around their names; return the normalisation to put before it.

    :raises ArqError: naming the first weight that is missing and the first that is not the network's
    """
    own = module.state_dict()
    needed = {name for name in own if not name.endswith(UNUSED)}
    layouts = list(_unwrapped(state))
    state, stored = next(
        (one for one in layouts if needed <= one[0].keys()), max(layouts, key=lambda one: len(needed & one[0].keys()))
    )
    missing = [name for name in own if name in needed and name not in state]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        told = [f"the first missing is {missing[0]!r}"] if missing else []
        told += [f"the first that the network does not have is {unexpected[0]!r}"] if unexpected else []
        raise ArqError(
            f"{path} holds the weights of another network ({', '.join(told)}): give the function that builds that network"
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise ArqError(
                f"{path} holds the weights of another network ({name!r} is {[*tensor.shape]} there and {[*own[name].shape]} here): "
                "build the network with the sizes that it was trained with"
            )
    fitting = own | {name: tensor.to(own[name].dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    try:
        give_state(module, fitting)
    except (ArqError, RuntimeError, TypeError) as error:
        raise ArqError(f"{path} cannot be loaded ({reason(error)})") from error
    return _one_normalization(stored, normalize, path)


def _unwrapped(state: State) -> Iterable[tuple[State, Normalization | str | None]]:
    """The state, then with one wrapper after the other taken off its names, and the normalisation that was in front.

    Such as ``module.`` of DataParallel, or ``0.`` and ``1.`` of a normalisation and the network. "unknown" stands for one that is
    not in the file.
    """
    stored: Normalization | str | None = None
    while True:
        yield state, stored
        fronts = {name.partition(".")[0] for name in state if "." in name}
        if any("." not in name for name in state) or not fronts:
            return
        if fronts == {"0", "1"}:
            front = {name[2:]: tensor for name, tensor in state.items() if name.startswith("0.")}
            mean = [tensor for name, tensor in front.items() if name in ("mean", "means", "mu")]
            std = [tensor for name, tensor in front.items() if name in ("std", "stds", "sd", "sds", "sigma")]
            if not (len(front) == 2 and mean and std):
                return
            stored, fronts = (mean[0].flatten().tolist(), std[0].flatten().tolist()), {"1"}
        elif len(fronts) > 1:
            return
        elif fronts == {"1"}:
            stored = "unknown"
        (wrapper,) = fronts
        state = {name.removeprefix(f"{wrapper}."): tensor for name, tensor in state.items() if name.startswith(f"{wrapper}.")}


def _one_normalization(stored, given: Normalization | None, path: str) -> Normalization | None:
    """The normalisation in the file or the one that was given, which must not contradict each other."""
    if stored is None or stored == "unknown" and given is not None:
        return given
    if stored == "unknown":
        raise ArqError(f"{path} was saved with a layer in front that holds no weights, a normalisation as a rule: give normalize")
    if given is not None and not np.allclose(np.array(given, float), np.array(stored), rtol=1e-5):
        raise ArqError(f"{path} holds another normalisation, {stored}, than was given: leave out normalize")
    return stored
