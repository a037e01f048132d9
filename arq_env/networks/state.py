"""The state of a training, kept after each epoch: it knows what it belongs to."""

import io
import json
import pickle
from pathlib import Path

import torch

from arq_env.support.errors import ArqError, reason
from arq_env.support.files import atomic_file


def save_state(folder: Path, belongs_to: str, network, optimizer, schedule, history: list[dict]) -> None:
    """Write ``folder/training.pt``, whole or not at all.

    :param belongs_to: everything that decides the weights, as a JSON object
    """
    state = {
        "belongs_to": belongs_to,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "history": history,
    }
    data = io.BytesIO()  # on a full disk torch.save hides the system's error behind one of its own
    torch.save(state, data)
    with atomic_file(Path(folder) / "training.pt") as file:
        file.write(data.getbuffer())


def restore_state(folder: Path, belongs_to: str, network, optimizer, schedule) -> list[dict]:
    """Give network, optimizer and schedule the state in ``folder``; return its history, which is empty where there is none.

    :raises ArqError: when it belongs to another training, naming in what, or is damaged
    """
    path = Path(folder) / "training.pt"
    if not path.exists():
        return []
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        there, here = json.loads(state["belongs_to"]), json.loads(belongs_to)
        differing = [key for key in here | there if here.get(key) != there.get(key)]
        if differing:
            raise ArqError(f"{path} is of another training (it differs in {', '.join(differing)}): choose another --output")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return list(state["history"])
    except ArqError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise ArqError(f"{path} cannot be gone on from ({reason(error)}): delete it, or choose another --output") from error
