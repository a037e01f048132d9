"""A compiled network says what the network says, here and in other processes."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch

from arq_env.certification import CompiledNetwork, certify
from tests.test_certification_methods import SETTINGS, columns


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_compiled_network_says_the_same():
    """A whole batch, a part of one, several, and through certify, in this process and in another."""
    images = np.random.default_rng(0).random((37, 3, 4, 4), np.float32)
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 3)
    ).eval()
    compiled, batch = CompiledNetwork(network, batch_size=8), torch.from_numpy(images)
    with torch.inference_mode():
        for count in (8, 3, 37):
            torch.testing.assert_close(compiled(batch[:count]), network(batch[:count]))
    got = certify(compiled, images, np.zeros(37), **SETTINGS)
    np.testing.assert_allclose(got.radius, certify(network, images, np.zeros(37), **SETTINGS).radius, atol=0.02)
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        sent = certify(compiled, images, np.zeros(37), map=processes.imap, **SETTINGS)
    assert columns(sent) == columns(got)
    with torch.inference_mode():
        expected = network(batch[:8])
        network[0].weight.zero_()  # it was compiled in as a constant
        torch.testing.assert_close(compiled(batch[:8]), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_network_arrives_once():
    """In a worker process, which gets it with every task."""
    network = torch.nn.Linear(3, 2).eval()
    sent = pickle.dumps(CompiledNetwork(network, batch_size=8))
    arrived = pickle.loads(sent)
    assert pickle.loads(sent) is arrived and arrived.batch_size == 8 and not arrived.training
    torch.testing.assert_close(arrived.network.weight, network.weight)
    assert pickle.loads(pickle.dumps(CompiledNetwork(network, batch_size=4))) is not arrived
