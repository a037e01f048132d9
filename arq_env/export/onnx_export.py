"""A quantized network as a standard ONNX file: weights at their bit-widths, activations rounded as the network rounds them."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from arq_env.certification.inputs import device_of
from arq_env.export.cards import quantized_layers, some_quantized_layers
from arq_env.export.graph import MARK, Rewriter, export_card, layer_of, marked_model
from arq_env.export.packages import onnx
from arq_env.export.runtime import LARGEST, OnnxClassifier
from arq_env.quantization.exact import exact_means
from arq_env.quantization.modules import QuantizedLayer
from arq_env.support.errors import ArqError
from arq_env.support.files import atomic_file

node = onnx.helper.make_node
INT2, INT4, INT8, INT32 = (getattr(onnx.TensorProto, name) for name in ("INT2", "INT4", "INT8", "INT32"))
#: The zero point of weights as UINT8.
MIDDLE = 128
#: Images that a file is checked on when it is written, and the largest median difference of logits, as a share of the largest
#: logit: single values within rounding of two codes move single images further.
CHECKED, ROUNDING = 9, 1e-3


def save_onnx(
    network: nn.Module, path: Path, card: dict, *, input_shape: tuple[int, ...], integers: bool = False
) -> OnnxClassifier:
    """Write a network, quantized or FP32, for ONNX Runtime and whatever else reads ONNX; return the file as a classifier.

    Input: ``images``, float32 [batch, c, h, w] in [0, 1]; output: ``logits``, float32 [batch, classes]. Weights are stored as INT2,
    INT4 (3 and 4 bits) or INT8 (5 to 8 bits; on integers UINT8 about 128 where one is beyond 64); activations are rounded to UINT8
    and, below 8 bits, clipped to their 2^bits codes.

    :param network: from :func:`arq_env.quantization.load_quantized` or a quantizer, in evaluation mode; it is not changed
    :param card: goes into the metadata, see :func:`arq_env.export.graph.export_card`
    :param input_shape: of one image
    :param integers: whether layers multiply integers (ConvInteger, MatMulInteger) and scale their exact sums, so that every value
        is the PyTorch network's bit for bit; else weights and activations are scaled first (DequantizeLinear), in the form that
        compilers for devices recognise
    :raises ArqError: where the network cannot be expressed, naming the layer, or the file does not compute what the network does
    """
    layers = some_quantized_layers(network) if integers else quantized_layers(network)
    rewriter = Rewriter(marked_model(network, input_shape, integers=integers))
    if integers:
        _write_integers(rewriter, layers)
    else:
        rewriter.replace_marks(partial(_dequantized_activation, rewriter, layers), partial(_dequantized_weight, rewriter, layers))
    arithmetic = "integer" if integers else "dequantized" if layers else "float32"
    model = rewriter.finish(export_card(network, card) | {"arithmetic": arithmetic})
    data = model.SerializeToString(deterministic=True)
    classifier = OnnxClassifier(data)
    _check(network, classifier, input_shape, exactly=integers)
    with atomic_file(path) as file:
        file.write(data)
    return classifier


def _check(network, classifier, input_shape, *, exactly: bool) -> None:
    """Raise an ArqError unless the file computes on noise what the network does."""
    images = torch.rand(CHECKED, *input_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), exact_means():
        expected = network(images.to(device_of(network))).float().cpu().numpy()
    got = classifier(images)
    apart = np.abs(got - expected).max(1) if got.shape == expected.shape else np.full(CHECKED, np.inf)
    if exactly and apart.max() > 0 or not np.median(apart) <= ROUNDING * np.abs(expected).max():
        raise ArqError(
            f"the exported file's logits differ from the network's by {np.median(apart):.3g} in the median"
            + (" where they should be the same: export as onnx" if exactly else ": the network is not understood")
        )


def _zero(rewriter: Rewriter, layer: QuantizedLayer) -> str:
    return rewriter.constant(f"{layer.name}.activation_zero", np.uint8(-layer.lowest))


def _step(rewriter: Rewriter, layer: QuantizedLayer) -> str:
    return rewriter.constant(f"{layer.name}.activation_step", layer.activation_step.cpu().numpy())


def _codes(rewriter: Rewriter, layer: QuantizedLayer, input: str, output: str) -> list:
    """Nodes that round an activation to codes from 0, as UINT8."""
    step, zero, most = _step(rewriter, layer), _zero(rewriter, layer), layer.highest - layer.lowest
    if most == 255:
        return [node("QuantizeLinear", [input, step, zero], [output])]
    limits = [rewriter.constant(f"{layer.name}.activation_{end}", np.uint8(code)) for end, code in (("least", 0), ("most", most))]
    return [
        node("QuantizeLinear", [input, step, zero], [f"{output}_unclipped"]),
        node("Clip", [f"{output}_unclipped", *limits], [output]),
    ]


def _dequantized_activation(rewriter, layers, name, input, output) -> list:
    layer, codes = layers[name], f"{output}_codes"
    scaled = node("DequantizeLinear", [codes, _step(rewriter, layer), _zero(rewriter, layer)], [output])
    return [*_codes(rewriter, layer, input, codes), scaled]


def _stored(rewriter: Rewriter, layer: QuantizedLayer, codes: np.ndarray) -> str:
    """Add a layer's weight at its bits; of 2 bits c = (code - 1) / 2, from -2 to 1 (0 in a channel of zeros)."""
    kind = INT2 if layer.weight_bits == 2 else INT4 if layer.weight_bits <= 4 else INT8
    return rewriter.constant(f"{layer.name}.weight", codes >> 1 if kind == INT2 else codes, kind)


def _dequantized_weight(rewriter, layers, name, output) -> list:
    layer = layers[name]
    axis = int(layer.kind.transposed)
    if axis and layer.groups > 1:
        raise ArqError(
            f"layer {name!r} is a transposed convolution of {layer.groups} groups, whose steps DequantizeLinear cannot hold: leave "
            "it at full precision (keep)"
        )
    codes, steps = layer.codes.cpu().numpy(), layer.weight_step.cpu().numpy()
    stored = _stored(rewriter, layer, codes)
    if layer.weight_bits > 2:
        return [node("DequantizeLinear", [stored, rewriter.constant(f"{name}.weight_step", steps)], [output], axis=axis)]
    # the codes -3, -1, 1, 3 are 2 c + 1 with c from -2 to 1; of a channel of zeros c is 0, and nothing is added
    shape = [1] * codes.ndim
    shape[axis] = -1
    middle = steps * (layer.rows(layer.codes) != 0).any(1).cpu().numpy()
    doubled, middle = rewriter.constant(f"{name}.weight_step", 2 * steps), middle.astype(np.float32).reshape(shape)
    return [
        node("DequantizeLinear", [stored, doubled], [f"{output}_even"], axis=axis),
        node("Add", [f"{output}_even", rewriter.constant(f"{name}.weight_middle", middle)], [output]),
    ]


def _write_integers(rewriter: Rewriter, layers: dict[str, QuantizedLayer]) -> None:
    """Turn marked nodes into integers, and the operations on them into integer ones."""
    for name, layer in layers.items():
        if layer.largest_sum() >= 2**24:
            raise ArqError(f"layer {name!r} can have sums up to {layer.largest_sum()}, which float32 does not hold: export as onnx")
    marks = {there.output[0]: there for there in rewriter.graph.node if there.domain == MARK}

    def operation(there):
        read = [marks[name] for name in there.input if name in marks]
        if not read:
            return None
        layer = layers[layer_of(read[0])]
        if there.op_type not in ("Conv", "MatMul") or [mark.op_type for mark in read] != ["Activation", "Weight"]:
            raise ArqError(
                f"layer {layer.name!r} reads its input by {there.op_type}, of which ONNX has no form on integers: export as onnx"
            )
        sums = f"{there.output[0]}_integers"
        zeros = [_zero(rewriter, layer)]
        if _may_saturate(layer):
            zeros.append(rewriter.constant("weight_zero", np.uint8(MIDDLE)))
        made = node(f"{there.op_type}Integer", [*there.input, *zeros], [sums])
        made.attribute.extend(there.attribute)
        return [made, node("Cast", [sums], there.output, to=onnx.TensorProto.FLOAT)]

    rewriter.replace(operation)
    rewriter.replace_marks(
        lambda name, input, output: _codes(rewriter, layers[name], input, output),
        lambda name, output: _integer_weight(rewriter, layers[name], output),
    )


def _may_saturate(layer: QuantizedLayer) -> bool:
    """Whether ONNX Runtime may sum the layer's weights wrongly as INT8."""
    return int(layer.codes.abs().max()) > LARGEST


def _integer_weight(rewriter, layer, output) -> list:
    """Nodes that make of the stored weight the layer's codes, as INT8; they are folded when a session starts.

    Where those may saturate the weight is UINT8 about 128, which ONNX Runtime sums in 32 bits on every CPU.
    """
    codes, turn = layer.codes.cpu().numpy(), np.transpose if layer.codes.dim() == 2 else np.asarray
    if _may_saturate(layer):
        stored = rewriter.constant(f"{layer.name}.weight", turn((codes.astype(np.int16) + MIDDLE).astype(np.uint8)))
        return [node("Identity", [stored], [output])]
    stored = _stored(rewriter, layer, turn(codes))
    if layer.weight_bits > 4:
        return [node("Identity", [stored], [output])]
    if layer.weight_bits > 2:
        return [node("Cast", [stored], [output], to=INT8)]
    # -3, -1, 1, 3 are 2 c + 1 with c from -2 to 1; of a channel of zeros c is 0, and nothing is added
    some = (layer.rows(layer.codes) != 0).any(1).cpu().numpy().reshape(-1, *[1] * (codes.ndim - 1))
    two, one = rewriter.constant("two", np.int32(2)), rewriter.constant(f"{layer.name}.weight_middle", turn(some.astype(np.int32)))
    half, even, odd = (f"{output}_{part}" for part in ("half", "even", "odd"))
    return [
        node("Cast", [stored], [half], to=INT32),
        node("Mul", [half, two], [even]),
        node("Add", [even, one], [odd]),
        node("Cast", [odd], [output], to=INT8),
    ]
