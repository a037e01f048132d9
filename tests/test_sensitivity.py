"""Sensitivities to second order are the divergences that they stand for."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from arq_env import ArqError
from arq_env.bitwidths import MAX_BITS, Bits, complete, uniform
from arq_env.evaluation import Evaluator
from arq_env.sensitivity import WITH_EFFECT, Divergence, SecondOrder, _Call, estimate_sensitivities, places
from tests.test_own_environments import problem_of
from tests.toy import toy_network, toy_problem


@pytest.mark.parametrize("made", [toy_problem, lambda: problem_of("transformer")], ids=["convolutions", "transformer"])
def test_they_are_what_one_place_after_the_other_measures(made):
    problem = made()
    quantizer, layers = Evaluator(problem).quantizer, problem.layers
    divergence, widest = Divergence(problem, quantizer), uniform(layers, MAX_BITS, MAX_BITS)
    least = divergence(widest)
    measured, estimated = [], []
    table = estimate_sensitivities(SecondOrder(problem, quantizer))
    assert list(table) == places(layers)
    for (layer, kind), effects in table.items():
        assert len(effects) == 7 and effects == sorted(effects, reverse=True) and effects[-1] == 0
        for i, bits in enumerate(WITH_EFFECT):
            coarse = Bits(MAX_BITS, MAX_BITS)._replace(**{kind: bits})
            measured.append(divergence(complete(widest | {layer: coarse}, layers)) - least)
            estimated.append(effects[i])
    assert stats.spearmanr(measured, estimated)[0] > 0.9
    assert 0.7 < np.median(np.array(estimated) / measured) < 1.5  # and not only in order: both are in nats


def test_what_batch_norm_takes_out_does_not_count():
    output = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    channels = torch.tensor([0.5, -2.0, 3.0]).view(3, 1, 1)
    shifted = 0.3 * output * channels + channels
    call = _Call("layer", 4, output, (), output, output, normed=True)
    assert call._left(shifted).abs().max() < 1e-5 and torch.equal(call._replace(normed=False)._left(shifted), shifted)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    assert call._left(noise).norm() > 0.9 * noise.norm()


def test_a_network_that_works_in_place_has_the_same():
    class InPlace(type(toy_network())):
        def forward(self, images):
            x = self.norm(self.first(images - 0.5)).relu_()
            x = x + self.deep(self.middle(x).relu_()).relu_()
            return self.last(x.mean((2, 3)))

    there = InPlace().eval()
    there.load_state_dict(toy_network().state_dict())
    found = [
        estimate_sensitivities(SecondOrder(problem, Evaluator(problem).quantizer))
        for problem in (toy_problem(), toy_problem(network=there))
    ]
    assert found[0] == found[1]


def test_the_problem_s_network_is_left_as_it_was():
    problem = toy_problem()
    SecondOrder(problem, Evaluator(problem).quantizer)(0)
    assert all(parameter.requires_grad for parameter in problem.network.parameters())
    hooks = [module._forward_hooks or module._forward_pre_hooks for module in problem.network.modules()]
    assert not any(hooks) and isinstance(problem.network, nn.Module)


def test_a_network_without_a_gradient_is_named():
    class Overwriting(type(toy_network())):
        def forward(self, images):
            x = torch.relu(self.norm(self.first(images - 0.5)))
            x += torch.relu(self.deep(torch.relu(self.middle(x))))  # and the gradient of what it was is gone
            return self.last(x.mean((2, 3)))

    network = Overwriting().eval()
    network.load_state_dict(toy_network().state_dict())
    problem = toy_problem(network=network)
    with pytest.raises(ArqError, match="no gradient comes through"):
        SecondOrder(problem, Evaluator(problem).quantizer)(0)
