"""An ONNX file, this package's or anybody's, as a classifier; what cannot be trusted is refused before it is run."""

import math
from collections.abc import Iterator

import numpy as np
import torch

from arq_env.export.packages import CARD, onnx, onnxruntime
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import parse_json, sha256

#: Most values that one tensor may have for one image: 1 GiB of float32.
MOST_VALUES = 2**28
#: Operators whose output has any size that a number in the file says.
_MADE_OF_VALUES = ("ConstantOfShape", "OneHot", "Range")
_SIZED_BY_VALUES = (*_MADE_OF_VALUES, "Expand", "Pad", "Resize", "Tile", "Upsample")
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_SCALED = ("QuantizeLinear", "DequantizeLinear")
#: The largest INT8 weight that ONNX Runtime multiplies by UINT8 rightly on every x86 CPU: without VNNI it adds two products in 16
#: bits, which saturate.
LARGEST = 64
#: Operators that sum integers, move values, or round one product, sum or quotient a value; and means, where they are of float64.
# fmt: off
_EXACT = frozenset((
    "Add", "Cast", "Clip", "Concat", "Constant", "ConvInteger", "Div", "Flatten", "Gather", "Identity", "MatMulInteger", "Max",
    "MaxPool", "Min", "Mul", "Neg", "Pad", "QuantizeLinear", "Relu", "Reshape", "Shape", "Slice", "Split", "Squeeze", "Sub",
    "Transpose", "Unsqueeze",
))
# fmt: on


class OnnxClassifier:
    """A function from images [b, c, h, w] (array or tensor) to logits [b, classes], computed by ONNX Runtime on the CPU.

    On as many threads as torch has when it is made, with ONNX Runtime's graph optimisations on. ``digest`` is the file's SHA-256,
    by which :func:`arq_env.certification.certify` knows it, ``card`` what its metadata says (empty for other packages' files),
    ``input_shape`` that of an image, ``exact`` whether it is known to give an image the same logits in any batch, on any number of
    threads and any CPU. It can be sent to worker processes.

    :param data: the file's bytes
    :raises ArqError: when they are no model of one input of any batch size, or one that is not to be trusted, saying why
    """

    def __init__(self, data: bytes):
        self.data, self.digest = data, sha256(data)
        try:
            model = onnx.load_model_from_string(data)
            self.input_shape = _checked(model)
            self.card, self.exact = _card(model), _is_exact(model)
            self._session = new_session(data)
        except ArqError:
            raise
        except Exception as error:  # each package has errors of its own for files that are damaged
            raise ArqError(
                f"the ONNX model cannot be used ({reason(error)}): restore the file, or write it again with experiments/export.py"
            ) from error
        self._input, self._output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name

    def __call__(self, images) -> np.ndarray:
        """Logits [b, classes] of images [b, c, h, w] in [0, 1].

        :raises ArqError: for images of another shape, and with ONNX Runtime's own words where it fails
        """
        images = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
        if images.shape[1:] != self.input_shape:
            raise ArqError(f"the ONNX model takes images {[*self.input_shape]}, and these are {[*images.shape[1:]]}")
        try:
            return self._session.run([self._output], {self._input: np.ascontiguousarray(images, np.float32)})[0]
        except Exception as error:  # ONNX Runtime has no class of its own for what fails in a run
            raise ArqError(
                f"the ONNX model failed on {len(images)} images ({reason(error)}): export it for any batch size"
            ) from error

    def __reduce__(self):
        return OnnxClassifier, (self.data,)


def new_session(data: bytes) -> "onnxruntime.InferenceSession":
    """A session on the CPU, on as many threads as torch has, with all graph optimisations."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 4  # what fails is raised
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _is_exact(model) -> bool:
    """Whether nothing in a model depends on an order of sums in float32, nor on how a CPU sums integers."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    doubles = {value.name for value in inferred.value_info if value.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE}
    means = [node for node in inferred.node if node.op_type == "ReduceMean"]
    constants = [attribute.t for node in model.graph.node if node.op_type == "Constant" for attribute in node.attribute]
    held = [there for there in (*model.graph.initializer, *constants) if there.data_type == onnx.TensorProto.INT8]
    if any((np.abs(onnx.numpy_helper.to_array(weight).astype(np.int16)) > LARGEST).any() for weight in held):
        return False
    others = {node.op_type for node in inferred.node} - _EXACT - {"ReduceMean"}
    return not others and all(node.input[0] in doubles for node in means)


def _card(model) -> dict:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return parse_json(entries[CARD].encode()) if CARD in entries else {}


def _checked(model) -> tuple[int, ...]:
    """The shape of one image that a model takes.

    :raises ArqError: for a model that reaches outside of itself, whose cost its size does not tell, or that is no classifier
    """
    graph = model.graph
    for tensor in _tensors(graph):
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ArqError(f"the ONNX model keeps {tensor.name!r} in another file: save it as one file, which is what is certified")
    if model.functions:
        raise ArqError("the ONNX model has functions of its own: inline them with onnx.inliner.inline_local_functions")
    for node in graph.node:
        if node.domain.startswith(("qonnx", "finn")):
            raise ArqError("the ONNX model is a QONNX file, which ONNX Runtime does not run: certify the same network's ONNX file")
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise ArqError(f"the ONNX model has {node.op_type}, whose path depends on values: export the network without branches")
        if node.op_type in _RANDOM:
            raise ArqError(f"the ONNX model has {node.op_type}: a classifier must give the same image the same output")
    onnx.checker.check_model(model)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    _check_values(graph, constants)
    inputs = [value for value in graph.input if value.name not in constants]
    if len(inputs) != 1 or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT or not graph.output:
        raise ArqError("the ONNX model is no classifier of images: it must have one input of float32 and one output, logits")
    batch, *shape = [dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim] or [1]
    if batch or len(shape) != 3 or not all(0 < size < 2**16 for size in shape):
        raise ArqError("the ONNX model's input must be [batch, c, h, w] of any batch size: export it with a dynamic batch")
    _check_sizes(model)
    return tuple(shape)


def _tensors(graph) -> Iterator["onnx.TensorProto"]:
    """Every constant of a graph."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors, attribute.sparse_tensor.values, attribute.sparse_tensor.indices)


def _check_values(graph, constants: dict) -> None:
    """Raise an ArqError for numbers that no network computes with, or fewer or more of them than the shape says."""
    scales = {node.input[1] for node in graph.node if node.op_type in _SCALED and len(node.input) > 1}
    for name, tensor in constants.items():
        if math.prod(tensor.dims) > 8 * tensor.ByteSize() or min(tensor.dims, default=0) < 0:
            raise ArqError(
                f"the ONNX model's {name!r} claims to be of shape {[*tensor.dims]}, which it has no values for: restore it"
            )
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise ArqError(f"the ONNX model's {name!r} holds NaN: write the file again")
        if name in scales and not (np.isfinite(values) & (values > 0)).all():
            raise ArqError(f"the ONNX model's {name!r} is a scale that is not finite and positive: write the file again")


def _check_sizes(model) -> None:
    """Raise an ArqError where a tensor is absurdly large, or its size is not known although values in the file decide it."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    shapes = {
        value.name: value.type.tensor_type.shape.dim
        for value in (*inferred.value_info, *inferred.output)
        if value.type.tensor_type.HasField("shape")
    }
    constants = {tensor.name: tensor for tensor in inferred.initializer}
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in inferred.input if value.name not in constants} - {""}
    for node in inferred.node:
        for name in node.output:
            values = math.prod(dim.dim_value or 1 for dim in shapes.get(name, ()))
            if node.op_type in _SIZED_BY_VALUES:
                told = [dim.dim_value or dim.dim_param in batch for dim in shapes.get(name, ())] or [False]
                if not all(told if node.op_type in _MADE_OF_VALUES else told[1:]):
                    raise ArqError(f"the ONNX model's {name!r} ({node.op_type}) has a size that cannot be told: fix its shape")
                sizes = [onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:] if name in constants]
                values = max([values, *(math.prod(max(1.0, abs(float(size))) for size in some.flat) for some in sizes)])
            if not values <= MOST_VALUES:
                raise ArqError(f"the ONNX model's {name!r} has {values:.9g} values for an image: at most {MOST_VALUES:,} are taken")
