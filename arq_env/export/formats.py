"""The formats that a finished network is written in, by name, so that a command line that shows them imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

#: What a file of each is called.
FORMATS = {
    "onnx": "network.onnx",
    "integer": "network.integer.onnx",
    "qonnx": "network.qonnx.onnx",
    "packed": "network.arq.safetensors",
    "mapping": "mapping.json",
}


def write_format(name: str, network: "nn.Module", folder: Path, card: dict, input_shape: tuple[int, int, int]) -> Path:
    """Write a quantized network in one format; return the file's path.

    :param card: what its file says of it, as :func:`arq_env.export.loading.load_with_card` returns it
    :param input_shape: of one image, [c, h, w]
    :raises ArqError: where a format cannot hold the network, a package of the extra ``export`` is missing, or the file computes
        something else
    """
    path = Path(folder) / FORMATS[name]
    if name == "packed":
        from arq_env.export.packed import save_packed

        save_packed(network, path, card)
    elif name == "mapping":
        from arq_env.export.mapping import save_mapping

        save_mapping(network, path, card)
    elif name == "qonnx":
        from arq_env.export.qonnx_export import save_qonnx

        save_qonnx(network, path, card, input_shape=input_shape)
    else:
        from arq_env.export.onnx_export import save_onnx

        save_onnx(network, path, card, input_shape=input_shape, integers=name == "integer")
    return path
