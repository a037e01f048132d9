"""Where an ONNX file and its network part: the first value that both round to different codes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from arq_env.export.cards import some_quantized_layers
from arq_env.export.packages import onnx
from arq_env.export.runtime import OnnxClassifier, new_session
from arq_env.quantization.exact import exact_means

#: How far from the middle between two codes, in steps, a value may be whose code differs by rounding of float32 alone; and how
#: close two logits, as a share of the largest, that change places.
ROUNDING = 1e-3


class Disagreement(NamedTuple):
    """What made a file give another label than the network.

    :param layer: the first at which a code differs; None where only logits do
    :param values: how many of its codes differ
    :param distance: the largest distance of such a value from the middle between two codes, in steps; of logits the distance of
        the two that change places, as a share of the largest
    :param explained: whether rounding of float32 alone explains it: each code differs by one, and the distance is small
    """

    layer: str | None
    values: int
    distance: float
    explained: bool


@torch.inference_mode()
def explain(network: nn.Module, file: OnnxClassifier, image: torch.Tensor) -> Disagreement:
    """Compare every code that one image makes in both.

    :param network: quantized, in evaluation mode, on the CPU
    :param file: that :func:`arq_env.export.onnx_export.save_onnx` wrote of it
    :param image: float32 [1, c, h, w]
    """
    layers = some_quantized_layers(network)
    seen: dict[str, torch.Tensor] = {}

    def note(layer):
        return lambda module, args: seen.setdefault(layer.name, args[0].clone())

    hooks = [layer.register_forward_pre_hook(note(layer)) for layer in layers.values()]
    try:
        with exact_means():
            logits = network(image).numpy()
    finally:
        for hook in hooks:
            hook.remove()
    for name, codes in _codes_of(file, image).items():
        layer = layers[name]
        scaled = (seen[name] / layer.activation_step).clamp_(layer.lowest, layer.highest)
        differences = torch.from_numpy(codes.astype(np.int64)) + layer.lowest - scaled.round().long()
        if (differing := differences != 0).any():
            distance = float((scaled[differing] - scaled[differing].floor() - 0.5).abs().max())
            one = bool((differences.abs() <= 1).all())
            return Disagreement(name, int(differing.sum()), distance, one and distance <= ROUNDING)
    there = file(image)
    largest = float(np.abs(logits).max())
    distance = float(logits[0].max() - logits[0, there[0].argmax()]) / largest
    return Disagreement(None, 0, distance, distance <= ROUNDING)


def _codes_of(file: OnnxClassifier, image: torch.Tensor) -> dict[str, np.ndarray]:
    """The codes of each layer's input as ONNX Runtime computes them, in the order of computation; of a layer's first call."""
    model = onnx.load_model_from_string(file.data)
    outputs: dict[str, str] = {}
    rounding = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    clipped = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type == "Clip" and node.input[0] in rounding}
    for output, node in rounding.items():
        outputs.setdefault(node.input[1].removesuffix(".activation_step"), clipped.get(output, output))
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None) for name in outputs.values())
    session = new_session(model.SerializeToString())
    return dict(zip(outputs, session.run(list(outputs.values()), {session.get_inputs()[0].name: image.numpy()}), strict=True))
