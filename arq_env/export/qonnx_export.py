"""A quantized network as a QONNX file: ``Quant`` nodes of any bit-width, for FINN, hls4ml and the tools around them."""

from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from arq_env.export.cards import some_quantized_layers
from arq_env.export.graph import Rewriter, export_card, marked_model
from arq_env.export.packages import onnx
from arq_env.support.files import atomic_file

DOMAIN, VERSION = "qonnx.custom_op.general", 1


def save_qonnx(network: nn.Module, path: Path, card: dict, *, input_shape: tuple[int, ...]) -> dict:
    """Write a quantized network as QONNX (Pappalardo et al. 2022); return the card in its metadata.

    It takes one image, [1, c, h, w], as those tools build for. Each layer reads two ``Quant`` nodes: of its input,
    and of its float32 weights, which are on their levels already. The four levels of 2-bit weights, -3, -1, 1 and 3 steps, are
    those of signed 2-bit integers times two steps about a zero point of -0.5.

    :param network: from :func:`arq_env.quantization.load_quantized` or a quantizer, in evaluation mode; it is not changed
    :param card: goes into the metadata, see :func:`arq_env.export.graph.export_card`
    :param input_shape: of one image
    :raises ArqError: where torch's exporter does not understand the network
    """
    rewriter, layers = Rewriter(marked_model(network, input_shape, any_batch=False)), some_quantized_layers(network)
    rewriter.replace_marks(partial(_activation, rewriter, layers), partial(_weight, rewriter, layers))
    card = export_card(network, card)
    model = rewriter.finish(card, shapes=True, opsets={DOMAIN: VERSION})
    with atomic_file(path) as file:
        file.write(model.SerializeToString(deterministic=True))
    return card


def _quant(rewriter, name, input, output, *, step, zero, bits: int, signed: bool, narrow: bool) -> list:
    """One ``Quant`` node: its output is (round(clip(input / step + zero)) - zero) step."""
    constants = {"step": step, "zero": np.asarray(zero, np.float32), "bits": np.float32(bits)}
    inputs = [input, *(rewriter.constant(f"{name}_{part}", values) for part, values in constants.items())]
    sign, narrowed = int(signed), int(narrow)
    return [onnx.helper.make_node("Quant", inputs, [output], domain=DOMAIN, signed=sign, narrow=narrowed, rounding_mode="ROUND")]


def _activation(rewriter, layers, name, input, output) -> list:
    layer = layers[name]
    symmetric = layer.lowest == -layer.highest  # with a code less than the bits have
    return _quant(
        rewriter,
        f"{name}.activation",
        input,
        output,
        step=layer.activation_step.cpu().numpy(),
        zero=0 if symmetric else -layer.lowest,
        bits=layer.activation_bits,
        signed=symmetric,
        narrow=symmetric,
    )


def _weight(rewriter, layers, name, output) -> list:
    layer = layers[name]
    two, rows = layer.weight_bits == 2, layer.rows(layer.codes)
    weight = rewriter.constant(f"{name}.weight", layer.weight.cpu().numpy())

    def spread(values):
        """One value for each output channel, in a shape that broadcasts over the weight."""
        spread = layer.kind.from_channels(values[:, None].expand_as(rows), layer.codes.shape, getattr(layer, "groups", 1))
        return _least_shape(spread.cpu().numpy())

    return _quant(
        rewriter,
        f"{name}.weight",
        weight,
        output,
        step=spread(layer.weight_step * (2 if two else 1)),
        zero=spread(-0.5 * (rows != 0).any(1)) if two else 0,  # a channel of zeros stays one
        bits=layer.weight_bits,
        signed=True,
        narrow=not two,
    )


def _least_shape(steps: np.ndarray) -> np.ndarray:
    """The same values with one entry along each axis on which they do not change."""
    for axis in range(steps.ndim):
        first = steps.take([0], axis)
        steps = first if (steps == first).all() else steps
    return np.ascontiguousarray(steps)
