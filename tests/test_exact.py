"""One map has one reward: on any number of threads, in any batch, with any of torch's kernels, on integers or floats."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from arq_env.bitwidths import Bits
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.problem import load_problem
from arq_env.quantization import integer
from arq_env.quantization.calibrate import reestimate_batch_norm
from arq_env.quantization.exact import ExactNorm, exact_means, exact_norms
from tests.toy import toy_problem

ROOT = Path(__file__).parent.parent


def rewards(images: int, count: int = 3) -> list:
    """ACRs of FP32 and of ``count`` maps of the shipped network, from scratch."""
    evaluator = Evaluator(load_problem("resnet20", "signs"), CertifierSettings(images=images))
    layers = evaluator.problem.layers
    maps = [{layer.name: Bits((7 * i + k) % 7 + 2, (5 * i + k) % 7 + 2) for i, layer in enumerate(layers)} for k in range(count)]
    assert evaluator.rounding == "exact"
    return [evaluator.reference.acr, *(evaluator.evaluate(bit_widths).acr for bit_widths in maps)]


@pytest.mark.slow
def test_threads_and_integer_kernels_change_no_bit(monkeypatch):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = rewards(64)
        torch.set_num_threads(2)
        two = rewards(64)
        monkeypatch.setattr(integer, "exact_pairs", lambda: -1)
        floats = rewards(64)
    finally:
        torch.set_num_threads(threads)
    assert one == two == floats


@functools.cache
def expected():
    return rewards(256)


@pytest.mark.slow
@pytest.mark.parametrize("capability, threads", [("default", 2), ("default", 4), ("avx2", 1), ("avx512", 1), ("avx512", 4)])
def test_other_kernels_change_no_bit(capability, threads):
    if capability == "avx512" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs a processor with AVX-512")
    setup = f"import torch, json; torch.set_num_threads({threads})"
    script = f"{setup}; from tests.test_exact import rewards; print(json.dumps(rewards(256)))"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == expected()


def test_the_batch_size_changes_no_bit():
    evaluator = Evaluator(toy_problem(), CertifierSettings(images=32))
    network = evaluator.quantizer.quantize({layer.name: Bits(3, 5) for layer in evaluator.problem.layers})
    images = evaluator.problem.calibration_images()[:60]
    with torch.inference_mode(), exact_means():
        whole = network(images)
        assert all(torch.equal(torch.cat([network(part) for part in images.split(size)]), whole) for size in (1, 7, 32))


@pytest.mark.parametrize("shape", [(64, 5), (64, 5, 7), (16, 5, 6, 6)])
@pytest.mark.parametrize("affine", [True, False])
def test_exact_norms_are_batch_norms(shape, affine):
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    plain = nn.Sequential(kind(5, affine=affine)).eval()
    if affine:
        nn.init.normal_(plain[0].weight), nn.init.normal_(plain[0].bias)
    exact = exact_norms(nn.Sequential(kind(5, affine=affine)).eval())
    exact.load_state_dict(plain.state_dict())
    x = 3 * torch.randn(shape) + 100
    for network in (plain, exact):
        reestimate_batch_norm(network, x)
    assert isinstance(exact[0], ExactNorm)
    torch.testing.assert_close(exact.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exact(x), plain(x), rtol=1e-4, atol=1e-3)


def test_what_is_not_exact_says_so():
    smooth = toy_problem()
    smooth.network.first = nn.Sequential(smooth.network.first, nn.SiLU())
    assert "threads" in Evaluator(smooth, CertifierSettings(images=32)).rounding
    counted = Evaluator(toy_problem(), CertifierSettings(images=32, n=16, reward_method="cohen"))
    assert "threads" in counted.rounding and Evaluator(toy_problem()).rounding == "exact"
