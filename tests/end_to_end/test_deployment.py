"""From a run folder to files for deployment and their certificates, as a user goes."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

import arq_env
from arq_env.bitwidths import Bits
from arq_env.certification import Certificates, network_digest
from arq_env.export.onnx_export import save_onnx
from arq_env.problem import load_problem
from arq_env.quantization import Quantizer, integer_network, save_quantized
from arq_env.quantization.exact import exact_means
from arq_env.quantization.integer import integer_kernels
from tests.end_to_end.scripts import assert_one_line_error, kill, lines, script
from tests.toy import depthwise_network, quantized_depthwise

SETTINGS = ["--data", "signs", "--every", "100", "--n", "60"]


def radii(folder) -> np.ndarray:
    (table,) = folder.glob("*.tsv")
    return Certificates.from_tsv(table).certified_radius


@pytest.mark.slow
def test_a_finished_run_is_deployed(tmp_path):
    """All formats of the Signs run; the file on integers has the network's own certificates, and the others nearly so."""
    run = tmp_path / "run"
    short = ["--epochs", "1", "--images", "256", "--every", "200", "--n", "30"]
    assert script("finalize", "W3A3", "--dataset", "signs", *short, "--output", run).returncode == 0
    done = script("export", run)
    assert done.returncode == 0 and done.stdout.count(" bytes") == 5, done.stderr
    found = {}
    for name, path in {
        "run": run,
        "packed": run / "network.arq.safetensors",
        "integer": run / "network.integer.onnx",
        "onnx": run / "network.onnx",
    }.items():
        done = script("certify", path, *SETTINGS, "--output", tmp_path / "found" / name)
        assert done.returncode == 0 and "ACR" in done.stdout, done.stderr
        found[name] = radii(tmp_path / "found" / name)
    assert np.array_equal(found["run"], found["packed"]) and np.array_equal(found["run"], found["integer"])
    assert np.abs(found["run"] - found["onnx"]).mean() < 0.02
    document = json.loads(next((tmp_path / "found/onnx").glob("*-n60.json")).read_text())
    assert document["classifier"]["digest"] == arq_env.load(run / "network.onnx").digest and document["sigma"] == 0.5
    assert_one_line_error(script("certify", run / "network.qonnx.onnx", *SETTINGS, "--output", tmp_path / "x"), "QONNX")
    assert_one_line_error(
        script("certify", run / "network.arq.safetensors", *SETTINGS, "--output", tmp_path / "found/onnx"), "classifier"
    )

    short = ["--noisy", "64", "--images", "3", "--n", "20", "--output", tmp_path / "study"]
    done = script("deployed", run, *short)
    assert done.returncode == 0 and "integer: 100.0000% of 64 labels agree" in done.stdout, done.stderr
    labels = json.loads((tmp_path / "study/run.json").read_text())["labels"]["onnx"]
    assert labels["explained"] == labels["disagreements"] == len(labels["causes"])
    done = script("deployment", run, "--rounds", "1", "--seconds", "0.05", "--output", tmp_path / "speed")
    assert done.returncode == 0 and "FP32, ONNX Runtime" in done.stdout, done.stderr


@pytest.mark.slow
def test_certificates_resume_after_a_kill(tmp_path):
    log = tmp_path / "out" / "certificates-every20-offset0-n300.tsv"
    shipped = "arq_env/networks/weights/resnet20-signs-sigma0.5-gaussian.safetensors"
    arguments = [shipped, "--data", "signs", "--sigma", "0.5", "--every", "20", "--n", "300", "--output", str(tmp_path / "out")]
    kill("certify", *arguments, when=lambda: len(lines(log)) > 1)
    kept = lines(log)
    done = script("certify", *arguments)
    assert done.returncode == 0 and lines(log)[: len(kept)] == kept and "100 test images" in done.stdout, done.stderr


@pytest.mark.slow
def test_an_own_network_is_deployed(tmp_path):
    """Depthwise layers, and a structure that only its own code knows: by import string, which is certified itself, too."""
    run = tmp_path / "run"
    save_quantized(quantized_depthwise(), run / "network.safetensors", {"network": None, "sigma": 0.5, "input_shape": [3, 8, 8]})
    own = ["--base", "tests.toy:DepthwiseNet"]
    done = script("export", run, *own)
    assert done.returncode == 0, done.stderr  # as large as the card says
    packed = arq_env.load(run / "network.arq.safetensors", depthwise_network())
    assert network_digest(packed) == network_digest(quantized_depthwise())
    colours = ["--data", "tests.toy:toy_dataset", "--every", "4", "--n", "60"]
    for name, path in {"run": run, "integer": run / "network.integer.onnx", "made": "tests.toy:depthwise_network"}.items():
        given = [
            *(own if name == "run" else []),
            *(["--sigma", "0.5"] if name == "made" else []),
            "--output",
            tmp_path / "found" / name,
        ]
        done = script("certify", path, *colours, *given)
        assert done.returncode == 0 and "ACR" in done.stdout, done.stderr
    others = script("certify", run, *own, *SETTINGS, "--output", tmp_path / "found/signs")
    assert_one_line_error(others, "3 classes apart, and the images have 10")
    assert np.array_equal(radii(tmp_path / "found/run"), radii(tmp_path / "found/integer"))
    assert_one_line_error(script("export", run, "--format", "packed"), "--base")
    assert_one_line_error(script("certify", "tests.toy:nothing", *SETTINGS, "--sigma", "0.5"), "tests.toy", "nothing")
    done = script("export", run, *own, "--input-shape", 1, 8, 8, "--format", "onnx")
    assert_one_line_error(done, "cannot be exported")


@pytest.mark.slow
def test_no_bit_differs(tmp_path):
    """PyTorch on floats and on integers, and ONNX Runtime on integers, in any batch, on any number of threads: the same logits."""
    problem = load_problem("resnet20", "signs")
    bit_widths = {layer.name: Bits(i % 7 + 2, (3 * i) % 7 + 2) for i, layer in enumerate(problem.layers)}
    network = Quantizer(problem.network, problem.layers, problem.calibration_images()).quantize(bit_widths)
    images = torch.rand(600, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    try:
        for count, size in ((1, 1), (2, 7), (1, 32), (2, 600)):
            torch.set_num_threads(count)
            file = save_onnx(network, tmp_path / "a.onnx", problem.card, input_shape=problem.input_shape, integers=True)
            found.append(np.concatenate([file(part) for part in images.split(size)]))
            for module in [network, *([integer_network(network)] if integer_kernels() else [])]:
                with torch.inference_mode(), exact_means():
                    found.append(torch.cat([module(part) for part in images.split(size)]).numpy())
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(logits, found[0]) for logits in found)
