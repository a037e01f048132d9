"""A quantized network as an ONNX graph in which quantization is still marked, for each format to write in its own way."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import arq_env
from arq_env.export.cards import kept_entries, quantized_layers
from arq_env.export.packages import CARD, onnx
from arq_env.layers import Linear
from arq_env.networks.checkpoints import copy_network
from arq_env.quantization.exact import ExactNorm, exact_means
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.support.errors import ArqError, reason
from arq_env.support.provenance import EXPORT_PACKAGES, provenance

#: The standard's first version whose DequantizeLinear reads 2-bit integers.
OPSET = 25
#: Domain of the nodes that stand for a layer's quantized input and weight until a format writes them.
MARK = "arq"
INPUT, OUTPUT = "images", "logits"


class _Marked(nn.Module):
    """A quantized layer whose quantizers are nodes of the graph, named by the layer.

    :param integers: whether the operation is on integers, to be scaled behind it, or on their products with the steps
    """

    def __init__(self, layer: QuantizedLayer, integers: bool):
        super().__init__()
        self.layers, self.integers = (layer,), integers  # in a tuple, so that torch registers none of its tensors
        if integers:
            self.register_buffer("scale", layer.weight_step * layer.activation_step)
        self.bias = layer.bias

    def forward(self, input, *more):
        (layer,), version = self.layers, {"version": 1}
        given, shape = {"layer": layer.name}, layer.codes.shape
        read = torch.onnx.ops.symbolic(f"{MARK}::Activation", (input,), given, dtype=input.dtype, shape=input.shape, **version)
        if self.integers and layer.kind is Linear:  # the integer product has no transposed form
            weight = torch.onnx.ops.symbolic(f"{MARK}::Weight", (), given, dtype=input.dtype, shape=shape[::-1], **version)
            output = read @ weight
        else:
            weight = torch.onnx.ops.symbolic(f"{MARK}::Weight", (), given, dtype=input.dtype, shape=shape, **version)
            output = layer.kind.run(layer, read, weight, None if self.integers else self.bias, *more)
        if self.integers:
            output = output * layer.kind.along_channels(self.scale, output)
            output = output if self.bias is None else output + layer.kind.along_channels(self.bias, output)
        return output


class _Affine(nn.Module):
    """BatchNorm in evaluation mode: one product and one sum a value."""

    def __init__(self, norm: ExactNorm, name: str):
        super().__init__()
        if norm.running_mean is None or norm.running_var is None:
            raise ArqError(
                f"{name!r} normalises by the batch it sees, so an image's output depends on others: track its statistics"
            )
        scale, shift = norm.scale_and_shift(norm.running_mean.double(), norm.running_var.double())
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("shift", shift.detach().float())

    def forward(self, input):
        shape = (-1, *[1] * (input.dim() - 2))
        return input * self.scale.view(shape) + self.shift.view(shape)


def marked_model(
    network: nn.Module, input_shape: tuple[int, ...], *, integers: bool = False, any_batch: bool = True
) -> "onnx.ModelProto":
    """The network as a model with nodes ``Activation`` (one input) and ``Weight`` (none) of a layer's name.

    :param network: in evaluation mode; it is not changed
    :param input_shape: of one image, [c, h, w]
    :param integers: whether layers compute on integers, their marked nodes standing for these, and scale behind
    :param any_batch: whether it takes any number of images, or one
    :raises ArqError: where torch's exporter does not understand the network, with its own words
    """
    marked = copy_network(network).cpu().eval()
    for name, layer in quantized_layers(marked).items():
        replace_module(marked, name, _Marked(layer, integers))
    for name, module in list(marked.named_modules()):
        if isinstance(module, ExactNorm):
            replace_module(marked, name, _Affine(module, name))
    images, batch = torch.zeros(2 if any_batch else 1, *input_shape), torch.export.Dim("batch")
    try:
        with _quiet(), exact_means() if integers else contextlib.nullcontext(), torch.no_grad():
            program = torch.onnx.export(
                marked,
                (images,),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},) if any_batch else None,
            )
    except Exception as error:  # whatever torch's exporter raises about somebody's network
        why = reason(error.__cause__ or error)  # the outer one is about the exporter's own steps
        raise ArqError(
            f"the network cannot be exported ({why}): it must work for images {[*input_shape]} in batches of any size, and take no "
            "path that depends on their values"
        ) from error
    assert program is not None  # as it is for dynamo
    model = copy.deepcopy(program.model_proto)
    model.producer_name, model.producer_version = "arq-env", arq_env.__version__
    for node in model.graph.node:  # where in torch's own files and the user's a node comes from
        del node.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:]
    return model


@contextlib.contextmanager
def _quiet():
    """Without the exporter's progress and its warnings about itself."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def layer_of(node: "onnx.NodeProto") -> str:
    """The layer that a marked node belongs to."""
    return onnx.helper.get_node_attr_value(node, "layer").decode()


class Rewriter:
    """Nodes and constants that take the place of marked nodes.

    :param model: from :func:`marked_model`, changed in place
    """

    def __init__(self, model: "onnx.ModelProto"):
        self.graph, self.model = model.graph, model

    def constant(self, name: str, values, kind: int | None = None) -> str:
        """Add a constant, unless it is there; return its name.

        :param kind: of :class:`onnx.TensorProto`, such as INT4; by default as NumPy has it
        """
        if all(there.name != name for there in self.graph.initializer):
            values = np.asarray(values)
            if kind is None:
                tensor = onnx.numpy_helper.from_array(values, name)
            else:
                tensor = onnx.helper.make_tensor(name, kind, values.shape, values.flatten().tolist())
            self.graph.initializer.append(tensor)
        return name

    def replace(self, make: Callable[["onnx.NodeProto"], list["onnx.NodeProto"] | None]) -> None:
        """Put ``make(node)`` in the place of each node; None keeps it."""
        nodes: list[onnx.NodeProto] = []
        for node in self.graph.node:
            made = make(node)
            nodes += [node] if made is None else made
        del self.graph.node[:]
        self.graph.node.extend(nodes)

    def replace_marks(self, activation: Callable, weight: Callable) -> None:
        """Put ``activation(layer name, input, output)`` and ``weight(layer name, output)`` in the place of marked nodes."""

        def make(node):
            if node.domain != MARK:
                return None
            layer = layer_of(node)
            return (
                activation(layer, node.input[0], node.output[0]) if node.op_type == "Activation" else weight(layer, node.output[0])
            )

        self.replace(make)

    def finish(self, card: dict, *, shapes: bool = False, opsets: dict[str, int] | None = None) -> "onnx.ModelProto":
        """The model checked, with only what is used, its card in the metadata and the opsets it needs.

        :param shapes: whether the shapes that torch's exporter noted stay, for what cannot infer them
        :param opsets: of other domains
        """
        used = {name for node in self.graph.node for name in node.input} | {output.name for output in self.graph.output}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:], self.model.opset_import[:]
        if not shapes:
            del self.graph.value_info[:]
        self.graph.initializer.extend(kept)
        domains = {"": OPSET} | (opsets or {})
        self.model.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in domains.items())
        self.model.ir_version = onnx.helper.find_min_ir_version_for(self.model.opset_import, ignore_unknown=True)
        onnx.helper.set_model_props(self.model, {CARD: json.dumps(card)})
        onnx.checker.check_model(self.model, full_check=True)
        return self.model


def export_card(network: nn.Module, card: dict) -> dict:
    """What stands in a file's metadata: what the network is, the bits of each layer, and versions of what made the file.

    Nothing in it changes from one call to the next, so that a file's digest does not either.

    :param card: from :func:`arq_env.quantization.load_quantized`, or any with ``network``, ``dataset`` and ``sigma``
    """
    return {
        **kept_entries(card),
        "layers": [
            {"name": name, "weight_bits": layer.weight_bits, "activation_bits": layer.activation_bits}
            for name, layer in quantized_layers(network).items()
        ],
        "versions": provenance(EXPORT_PACKAGES)["versions"],
    }
