"""Sensitivities to second order are the divergences that they stand for."""

import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from arq_env import ArqError
from arq_env.bitwidths import MAX_BITS, Bits, complete, uniform
from arq_env.evaluation import Evaluator
from arq_env.sensitivity import WITH_EFFECT, Divergence, SecondOrder, _Call, _labels, estimate_sensitivities, places
from tests.test_own_environments import problem_of
from tests.toy import toy_network, toy_problem


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(toy_problem, id="convolutions"),
        pytest.param(lambda: problem_of("transformer"), id="transformer", marks=pytest.mark.slow),
    ],
)
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
    shifted, ones = 0.3 * output * channels + channels, torch.ones_like(output)
    read_by_it = _Call("layer", 4, output, (), output, [ones], ones)
    assert read_by_it._weighed(shifted).abs().max() < 1e-5
    assert torch.equal(read_by_it._replace(normed=[])._weighed(shifted), shifted)
    besides = read_by_it._replace(gradient=3 * ones)  # two thirds of the gradient pass it by
    torch.testing.assert_close(besides._weighed(shifted), 2 * shifted)
    noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    assert read_by_it._weighed(noise).norm() > 0.9 * noise.norm()


def test_labels_are_weighed_to_the_mean_over_all_classes():
    p = torch.tensor([[0.98, 0.015, 0.005]]).double().expand(20_000, 3)
    drawn, weight = _labels(p, torch.Generator().manual_seed(0))
    assert (drawn > 0).double().mean() > 0.3  # and not .02
    for label, share in enumerate(p[0]):
        assert float((weight.square() * (drawn == label)).mean()) == pytest.approx(float(share), rel=0.05)
    sure = torch.tensor([[1.0, 0.0, 0.0]]).double()
    assert _labels(sure, torch.Generator().manual_seed(0))[1].isfinite().all()


class Sequence(nn.Module):
    """A perceptron over positions, with images in the first or in the second dimension."""

    def __init__(self, first: bool):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.read, self.mix, self.out = first, nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, images):
        x = images.flatten(2).permute(0, 2, 1) if self.first else images.flatten(2).permute(2, 0, 1)
        return self.out(torch.relu(self.mix(torch.relu(self.read(x)))).mean(1 if self.first else 0))


def test_images_may_be_the_second_dimension():
    first, second = (
        estimate_sensitivities(SecondOrder(problem, Evaluator(problem).quantizer))
        for problem in (toy_problem(network=Sequence(first).eval()) for first in (True, False))
    )
    assert max(first["mix", "weight"]) > 0
    for place, effects in first.items():  # activations are sampled in another order
        assert effects == pytest.approx(second[place], rel=0.1)


def test_workers_are_sent_each_image_once():
    problem = toy_problem()
    order = SecondOrder(problem, Evaluator(problem).quantizer)
    assert len(order.parts) > 10 and len(pickle.dumps(order)) < 2 * order.images.nbytes


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
    with pytest.raises(ArqError, match="gradient fails"):
        SecondOrder(problem, Evaluator(problem).quantizer)(0)


def test_where_no_gradient_comes_from_is_said():
    class Frozen(type(toy_network())):
        def forward(self, images):
            with torch.no_grad():
                x = torch.relu(self.norm(self.first(images - 0.5)))
                x = x + torch.relu(self.middle(x))
            return self.last((x + torch.relu(self.deep(x))).mean((2, 3)))

    network = Frozen().eval()
    network.load_state_dict(toy_network().state_dict())
    problem = toy_problem(network=network)
    with pytest.warns(UserWarning, match="rounding changes nothing at middle, or no gradient"):
        table = estimate_sensitivities(SecondOrder(problem, Evaluator(problem).quantizer))
    assert max(table["middle", "weight"]) == 0 < max(table["deep", "weight"])


def test_a_gradient_that_is_not_finite_is_an_error():
    class Endless(type(toy_network())):
        def forward(self, images):
            x = super().forward(images)
            return x + torch.sqrt((x - x.detach()).abs())

    network = Endless().eval()
    network.load_state_dict(toy_network().state_dict())
    problem = toy_problem(network=network)
    with pytest.raises(ArqError, match="gradient at layer 'middle' is not finite"):
        estimate_sensitivities(SecondOrder(problem, Evaluator(problem).quantizer))
