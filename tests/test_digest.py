"""Networks that compute something else have another digest; one network has the same one everywhere."""

import copy
import functools
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn

from arq_env import ArqError
from arq_env.bitwidths import uniform
from arq_env.certification import CompiledNetwork, cache_predictions, certify, network_digest

IMAGES = np.full((2, 3, 4, 4), 0.5, np.float32)
ASK = {"sigma": 0.5, "n0": 8, "n": 16}


class Plain(nn.Module):
    """Takes whatever attributes it is given."""

    def __init__(self, **attributes):
        super().__init__()
        self.last = nn.Linear(3, 2)
        for parameter in self.parameters():
            nn.init.ones_(parameter)
        for name, value in attributes.items():
            setattr(self, name, value)
        self.eval()

    def forward(self, x):
        return self.last(x.mean((2, 3)))


class Buffered(Plain):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("kept", torch.tensor(value), persistent=False)


THRESHOLD = 0.5


def cut(x):
    return x.clamp(min=THRESHOLD)


class Edited(Plain):
    def forward(self, x):
        return 2 * super().forward(x)


class Constant(Plain):
    threshold = 0.5


class OtherConstant(Plain):
    threshold = 0.6


Edited.__qualname__ = OtherConstant.__qualname__ = Constant.__qualname__ = Plain.__qualname__


def with_hook(factor):
    network = Plain()
    network.last.register_forward_hook(lambda module, inputs, output: factor * output)
    return network


def patched(factor):
    network = Plain()
    network.last.forward = lambda x: factor * nn.functional.linear(x, network.last.weight)
    return network


def closed_over(number):
    return lambda x: x + number


def traced(mean):
    return torch.jit.trace(nn.Sequential(Plain(), Shift(mean)).eval(), torch.zeros(1, 3, 4, 4))


class Shift(nn.Module):
    def __init__(self, mean):
        super().__init__()
        self.mean = torch.tensor(mean)

    def forward(self, x):
        return x - self.mean


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "one, other",
    [
        (lambda: Plain(mean=torch.zeros(3)), lambda: Plain(mean=torch.ones(3))),
        (lambda: Plain(mean=torch.tensor(0.0)), lambda: Plain(mean=torch.tensor(-0.0))),
        (lambda: Plain(mean=torch.zeros(2000)), lambda: Plain(mean=torch.eye(2000)[1000])),
        (lambda: Plain(mean=torch.zeros(2, dtype=torch.bfloat16)), lambda: Plain(mean=torch.ones(2, dtype=torch.bfloat16))),
        (lambda: Plain(mean=np.zeros(3)), lambda: Plain(mean=np.ones(3))),
        (lambda: Plain(means=[torch.zeros(1), {"a": 1.0}]), lambda: Plain(means=[torch.zeros(1), {"a": 1.5}])),
        (lambda: Plain(threshold=0.5), lambda: Plain(threshold=0.25)),
        (lambda: Plain(act=torch.relu), lambda: Plain(act=torch.tanh)),
        (lambda: Plain(act=nn.functional.relu), lambda: Plain(act=nn.functional.gelu)),
        (lambda: Plain(act=lambda x: x + 1), lambda: Plain(act=lambda x: x + 2)),
        (lambda: Plain(act=lambda x: x.relu()), lambda: Plain(act=lambda x: x.tanh())),
        (lambda: Plain(act=closed_over(1)), lambda: Plain(act=closed_over(2))),
        (lambda: Plain(act=functools.partial(torch.clamp, min=0)), lambda: Plain(act=functools.partial(torch.clamp, min=1))),
        (lambda: Plain(act=functools.cache(lambda x: x + 1)), lambda: Plain(act=functools.cache(lambda x: x + 2))),
        (lambda: Buffered(0.0), lambda: Buffered(1.0)),
        (Plain, Edited),
        (Constant, OtherConstant),
        (lambda: with_hook(2), lambda: with_hook(3)),
        (lambda: patched(2), lambda: patched(3)),
        (lambda: nn.Conv2d(3, 3, 3, padding=0), lambda: nn.Conv2d(3, 3, 3, padding=1)),
        (lambda: Plain().train(), Plain),
        (lambda: traced(0.0), lambda: traced(0.5)),
    ],
)
def test_what_computes_something_else_has_another_digest(one, other):
    torch.manual_seed(0)
    first = network_digest(one())
    torch.manual_seed(0)
    assert network_digest(one()) == first or isinstance(one(), torch.jit.ScriptModule)
    torch.manual_seed(0)
    assert network_digest(other()) != first


def test_a_number_of_the_file_counts(monkeypatch):
    before = network_digest(Plain(act=cut))
    monkeypatch.setitem(globals(), "THRESHOLD", 0.6)
    assert network_digest(Plain(act=cut)) != before


class Rounding(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.round()


class Rounds(Plain):
    @torch.no_grad()
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x):
        return Rounding.apply(super().forward(x))


def test_a_function_that_a_decorated_forward_uses_counts(monkeypatch):
    network = Rounds()
    before = network_digest(network)
    network(torch.zeros(1, 3, 4, 4))
    assert network_digest(network) == before
    monkeypatch.setattr(Rounding, "forward", staticmethod(lambda context, x: x.floor()))
    assert network_digest(network) != before


def test_quantized_layers_that_differ_in_what_no_weight_shows(toy_env):
    """Every number that a quantized layer and its parts hold beside their weights, such as the range of their inputs."""
    network = toy_env.evaluator.quantizer.quantize(uniform(toy_env.layers, 4, 4))
    before = network_digest(network)
    assert network_digest(copy.deepcopy(network)) == before
    numbers = [
        (part, key, value)
        for part in network.middle.modules()
        for key, value in vars(part).items()
        if isinstance(value, int) and not key.startswith("_")
    ]
    assert len(numbers) > 3
    for part, key, value in numbers:
        setattr(part, key, not value if isinstance(value, bool) else value + 1)
        assert network_digest(network) != before, key
        setattr(part, key, value)
    assert network_digest(network) == before


@pytest.mark.slow
def test_one_network_has_one_digest():
    """In any layout, after use, saved and loaded, holding itself, and in a process that hashes otherwise and has more threads."""
    network = nn.Sequential(nn.Conv2d(3, 3, 3), Plain(act=closed_over(1), names={"b", "a"}, lock=threading.Lock())).eval()
    nn.init.ones_(network[0].weight), nn.init.zeros_(network[0].bias)
    network[1].me = [network, Rounds()]
    digest = network_digest(network)
    network(torch.zeros(1, 3, 4, 4))
    assert network_digest(network) == network_digest(network.to(memory_format=torch.channels_last)) == digest
    assert network_digest(network, "a name") != digest
    code = "from tests.test_digest import *; print(network_digest(Plain(names={'a', 'b', 'c'}, act=closed_over(1))))"
    elsewhere = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    said = subprocess.run([sys.executable, "-c", code], env=elsewhere, capture_output=True, text=True, check=True).stdout
    assert said.strip() == network_digest(Plain(names={"a", "b", "c"}, act=closed_over(1)))


def test_what_cannot_be_read_needs_a_name():
    network = Plain(session=(i for i in range(3)))
    with pytest.raises(ArqError, match="generator.*name="):
        network_digest(network)
    assert network_digest(network, "v1") != network_digest(network, "v2")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_nobody_gets_another_network_s_results(tmp_path):
    """Through a log, a cache's file, and what arrives in a worker process."""
    one, other = (nn.Sequential(Shift(mean), Plain()).eval() for mean in (0.0, 0.3))
    certify(one, IMAGES, [0, 0], log=tmp_path / "log.tsv", **ASK)
    with pytest.raises(ArqError, match="another classifier"):
        certify(other, IMAGES, [0, 0], log=tmp_path / "log.tsv", **ASK)
    cache_predictions(one, IMAGES, path=tmp_path / "cache.npz", **ASK)
    with pytest.raises(ArqError, match="another network"):
        cache_predictions(other, IMAGES, path=tmp_path / "cache.npz", **ASK)
    sent, other_sent = (pickle.dumps(CompiledNetwork(network)) for network in (one, other))
    first = pickle.loads(sent)
    assert pickle.loads(sent) is first and pickle.loads(other_sent).network[0].mean == other[0].mean
    changed = pickle.loads(sent)
    changed.network[1].last.bias.data += 1  # whoever got it may change it: it is not handed out again as what it was
    assert network_digest(pickle.loads(sent).network) == network_digest(one)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_a_copy_of_a_compiled_network_is_another_one():
    compiled = CompiledNetwork(Plain(), batch_size=4)
    for twin in (copy.deepcopy(compiled), copy.copy(compiled)):
        assert twin is not compiled and twin.batch_size == 4 and network_digest(twin) == network_digest(compiled)
    twin = copy.deepcopy(compiled)
    twin.network.last.bias.data += 1
    assert compiled.network.last.bias[0] == 1
    for wrong in ((len, 4), (Plain(), 0), (Plain(), "many")):
        with pytest.raises(ArqError, match="network is|batch_size is"):
            CompiledNetwork(*wrong)
