"""What every format says of a network beside its weights."""

from torch import nn

from arq_env.quantization.modules import QuantizedLayer
from arq_env.support.errors import ArqError

#: Entries of a finished network's card that files for deployment keep; all the rest is in the run folder.
KEPT = ("map", "network", "dataset", "input_shape", "sigma", "training", "checkpoint", "bops_fraction", "made_from", "digest")


def kept_entries(card: dict) -> dict:
    """What of a card goes into a file for deployment; ``digest`` becomes that of the file it was made from."""
    return {"made_from" if key == "digest" else key: card[key] for key in KEPT if key in card}


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers by name; none of an FP32 network."""
    return {module.name: module for module in network.modules() if isinstance(module, QuantizedLayer)}


def some_quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers by name.

    :raises ArqError: where there are none
    """
    layers = quantized_layers(network)
    if not layers:
        raise ArqError("the network has no quantized layer: give one from Quantizer, load_quantized or finalize.py")
    return layers
