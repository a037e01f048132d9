import pytest
import torch

from arq_env.support import machine


@pytest.mark.parametrize(
    "capabilities, precision", [({}, "fp32"), ({"avx2": True, "avx512_bf16": False}, "fp32"), ({"avx512_bf16": True}, "bf16")]
)
def test_bfloat16_only_where_the_processor_has_it(monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert machine.fastest_precision() == precision


def test_what_cannot_be_compiled_is_found_out(monkeypatch):
    def fails(_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    assert not machine.compiles()
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert machine.compiles()
