"""ONNX files: what they compute, what tells them apart, and which are refused before they are run."""

import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import arq_env
from arq_env import ArqError
from arq_env.certification import certify
from arq_env.export.agreement import explain
from arq_env.export.onnx_export import save_onnx
from arq_env.export.qonnx_export import save_qonnx
from arq_env.export.runtime import OnnxClassifier
from arq_env.quantization.exact import exact_means
from tests.test_hostile_files import outcome_of
from tests.toy import SHAPE, quantized_depthwise, toy_dataset, toy_network

IMAGES = torch.rand(40, *SHAPE, generator=torch.Generator().manual_seed(1))
#: Of the stem, the depthwise and the pointwise convolution and the linear layer.
BITS, ACTIVATION_BITS = (2, 3, 4, 8), (8, 2, 5, 4)


@pytest.fixture(scope="module")
def network():
    return quantized_depthwise(BITS, ACTIVATION_BITS)


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """The network as ONNX, and as a classifier."""
    path = tmp_path_factory.mktemp("onnx") / "a.onnx"
    return path, save_onnx(network, path, {"sigma": 0.5, "digest": "of the source"}, input_shape=SHAPE)


def logits(network):
    with torch.inference_mode(), exact_means():
        return network(IMAGES).numpy()


def test_a_file_with_its_bits(network, file):
    """Types of 2, 4 and 8 bits, any batch size, the same function up to rounding."""
    path, classifier = file
    model = onnx.load_model(path)
    onnx.checker.check_model(model, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    wanted = {"stem": "INT2", "depthwise": "INT4", "pointwise": "INT4", "last": "INT8"}
    assert {name: kinds[f"{name}.weight"] for name in wanted} == {
        name: TensorProto.DataType.Value(kind) for name, kind in wanted.items()
    }
    assert not any(node.domain for node in model.graph.node) and [opset.version for opset in model.opset_import] == [25]

    card = classifier.card
    assert card["sigma"] == 0.5 and card["made_from"] == "of the source" and classifier.input_shape == SHAPE
    assert [(layer["weight_bits"], layer["activation_bits"]) for layer in card["layers"]] == list(
        zip(BITS, ACTIVATION_BITS, strict=True)
    )
    expected, got = logits(network), classifier(IMAGES)
    near = np.abs(got - expected).max(1) < 1e-5
    assert near.mean() > 0.9  # a value within rounding of two codes is seldom
    assert all(explain(network, classifier, IMAGES[row : row + 1]).explained for row in np.flatnonzero(~near))
    np.testing.assert_allclose(np.concatenate([classifier(image[None]) for image in IMAGES]), got, atol=1e-6)
    loaded = arq_env.load(path)
    assert loaded.digest == classifier.digest and pickle.loads(pickle.dumps(loaded)).digest == classifier.digest
    with pytest.raises(ArqError, match=r"takes images \[3, 8, 8\]"):
        loaded(torch.rand(1, 3, 9, 8))


def test_a_log_is_tied_to_its_file(network, file, tmp_path):
    loaded = arq_env.load(file[0])
    labels = np.zeros(len(IMAGES))
    for _ in range(2):  # the second finds everything in the log
        table = certify(loaded, IMAGES, labels, sigma=0.5, n=20, n0=2, alpha=0.1, log=tmp_path / "log.tsv")
    here = certify(network, IMAGES, labels, sigma=0.5, n=20, n0=2, alpha=0.1)
    assert (table.prediction == here.prediction).mean() > 0.9
    with pytest.raises(ArqError, match="classifier"):
        certify(network, IMAGES, labels, sigma=0.5, n=20, n0=2, alpha=0.1, log=tmp_path / "log.tsv")


def test_a_file_on_integers_is_the_network_bit_for_bit(network, tmp_path):
    classifier = save_onnx(network, tmp_path / "a.onnx", {}, input_shape=SHAPE, integers=True)
    operators = [node.op_type for node in onnx.load_model(tmp_path / "a.onnx").graph.node]
    assert operators.count("ConvInteger") == 3 and operators.count("MatMulInteger") == 1 and "DequantizeLinear" not in operators
    assert np.array_equal(classifier(IMAGES), logits(network))
    for size in (1, 3, 40):
        assert np.array_equal(np.concatenate([classifier(part) for part in IMAGES.split(size)]), classifier(IMAGES))


def test_a_disagreement_that_rounding_does_not_explain(file):
    classifier = file[1]
    other = quantized_depthwise(BITS, ACTIVATION_BITS)
    other.norm.bias.data += 0.3
    found = explain(other, classifier, IMAGES[:1])
    assert found.layer == "depthwise" and not found.explained
    other = quantized_depthwise(BITS, ACTIVATION_BITS)
    other.last.bias.data += torch.tensor([0.0, 0.0, 100.0])
    found = explain(other, classifier, IMAGES[:1])
    assert found.layer is None and found.distance > 0.5 and not found.explained


def test_what_cannot_be_exported(tmp_path):
    class Branching(type(toy_network())):
        def forward(self, images):
            return super().forward(images) * (2 if images.sum() > 0 else 1)

    network = Branching().eval()
    with pytest.raises(ArqError, match="cannot be exported"):
        save_onnx(network, tmp_path / "a.onnx", {}, input_shape=SHAPE)
    for write in (partial(save_onnx, integers=True), save_qonnx):
        with pytest.raises(ArqError, match="no quantized layer"):
            write(toy_network(), tmp_path / "a.onnx", {}, input_shape=SHAPE)
    assert not (tmp_path / "a.onnx").exists()


def test_qonnx_by_its_own_executor(network, tmp_path):
    """On images of the data set, against the network; the nodes have the bits of the map."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that it imports
        execution = pytest.importorskip("qonnx.core.onnx_exec")
        from qonnx.core.modelwrapper import ModelWrapper
    save_qonnx(network, tmp_path / "a.onnx", {"sigma": 0.5}, input_shape=SHAPE)
    model = ModelWrapper(str(tmp_path / "a.onnx"))
    quantizers = [node for node in model.graph.node if node.op_type == "Quant"]
    bits = {node.input[0]: float(model.get_initializer(node.input[3])) for node in quantizers}
    assert sorted(bits.values()) == sorted(BITS + ACTIVATION_BITS) and bits["stem.weight"] == 2
    images = toy_dataset().test.images[:8].transpose(0, 3, 1, 2).astype(np.float32) / 255
    for image in images:
        got = execution.execute_onnx(model, {"images": image[None]})["logits"]
        np.testing.assert_allclose(got, network(torch.from_numpy(image[None])).detach().numpy(), atol=1e-5)
    with pytest.raises(ArqError, match="QONNX"):
        arq_env.load(tmp_path / "a.onnx")


def small_model() -> onnx.ModelProto:
    """A linear classifier of quantized images, in a few nodes."""
    constants = {
        "scale": np.float32(0.01),
        "zero": np.uint8(0),
        "weight": np.ones((48, 3), np.float32),
        "shape": np.array([-1, 48]),
        "pads": np.zeros(4, np.int64),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["rounded"]),
        helper.make_node("Reshape", ["rounded", "shape"], ["rows"]),
        helper.make_node("Pad", ["rows", "pads"], ["padded"]),
        helper.make_node("MatMul", ["padded", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def constant(model, name):
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def given_values(name, values):
    return lambda model: constant(model, name).CopyFrom(numpy_helper.from_array(values, name))


def outside(model):
    tensor = constant(model, "weight")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "../../../etc/passwd", "offset": "0", "length": "576"}.items():
        tensor.external_data.add(key=key, value=value)


def outside_in_a_node(model):
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "far")
    tensor.external_data.add(key="location", value="far")
    model.graph.node.append(helper.make_node("Constant", [], ["far"], value=tensor))


def claimed(model):
    constant(model, "weight").dims[:] = [2**40, 2**20]


def branch(model):
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["shape"], ["more"], then_branch=body, else_branch=body))


def endless(model):
    model.graph.node.append(helper.make_node("Tile", ["images", "much"], ["huge"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2**40, 1, 1, 1]), "much"))


def unknown_size(model):
    model.graph.node.append(helper.make_node("Cast", ["logits"], ["sizes"], to=TensorProto.INT64))
    model.graph.node.append(helper.make_node("Gather", ["sizes", "zero_index"], ["size"]))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["huge"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "zero_index"))


def function(model):
    made = helper.make_function("own", "F", ["x"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], model.opset_import)
    model.functions.append(made)


def input_of(kind, shape):
    return lambda model: model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", kind, shape))


def test_a_model_of_somebody_else():
    classifier = OnnxClassifier(small_model().SerializeToString())
    assert classifier(np.ones((5, 3, 4, 4), np.float32)).shape == (5, 3) and classifier.card == {}


@pytest.mark.parametrize(
    "change, part",
    [
        (outside, "another file"),
        (outside_in_a_node, "another file"),
        (claimed, "cannot be used|claims to be of shape"),
        (given_values("scale", np.float32(0)), "scale"),
        (given_values("scale", np.float32(-1)), "scale"),
        (given_values("scale", np.float32("inf")), "scale"),
        (given_values("scale", np.float32("nan")), "NaN"),
        (given_values("weight", np.full((48, 3), np.nan, np.float32)), "NaN"),
        (given_values("weight", np.ones((47, 3), np.float32)), "cannot be used"),
        (lambda model: model.graph.node[4].input.__setitem__(1, "weights"), "cannot be used"),
        (lambda model: model.graph.node[0].__setattr__("op_type", "Quantise"), "cannot be used"),
        (branch, "If"),
        (endless, "values for an image"),
        (unknown_size, "cannot be told"),
        (given_values("pads", np.array([0, 0, 0, 2**40])), "cannot be used|values for an image"),
        (function, "functions of its own"),
        (lambda model: model.graph.node.append(helper.make_node("RandomNormal", [], ["noise"], shape=[3])), "same output"),
        (input_of(TensorProto.FLOAT, [4, 3, 4, 4]), "dynamic batch"),
        (input_of(TensorProto.FLOAT, ["batch", 48]), "dynamic batch"),
        (input_of(TensorProto.FLOAT, ["batch", 3, 2**20, 2**20]), "dynamic batch"),
        (input_of(TensorProto.DOUBLE, ["batch", 3, 4, 4]), "float32|cannot be used"),
        (lambda model: model.metadata_props.add(key="arq", value="[]"), "cannot be used"),
    ],
)
def test_models_that_are_refused(change, part):
    model = small_model()
    change(model)
    with pytest.raises(ArqError, match=part) as refused:
        OnnxClassifier(model.SerializeToString())
    assert "\n" not in str(refused.value)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_models(data):
    """Cut short, or with other bytes in it: refused in one line, or a classifier."""
    whole = small_model().SerializeToString()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from(
            [whole[:place], whole[place:], whole[:place] + data.draw(st.binary(min_size=1, max_size=4)) + whole[place + 1 :]]
        )
    )
    classifier, refused = outcome_of(lambda: OnnxClassifier(damaged))
    assert refused or classifier.digest
