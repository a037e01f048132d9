"""The cheapest map that keeps a share of FP32's radius."""

from types import SimpleNamespace

import numpy as np
import pytest

from arq_agents.baselines import least_sensitive
from arq_agents.target import DRAWS, HALVINGS, cheapest
from arq_env import ArqError
from arq_env.bitwidths import free_layers
from arq_env.evaluation import Evaluator
from tests.toy import make_toy_env


def proposer(env):
    return lambda budget: least_sensitive(env, env.sensitivities, budget=env.default_budget.at(budget))


@pytest.fixture
def env(monkeypatch):
    """Each bit of a free layer divides what its weights or activations lose by four, and draws differ by a little."""

    def evaluate(self, bit_widths):
        lost = np.mean([4.0 ** -(bits - 2) for layer in free_layers(self.problem.layers) for bits in bit_widths[layer.name]])
        return SimpleNamespace(acr=1 - 0.2 * lost + 1e-4 * np.sin(self.settings.seed))

    monkeypatch.setattr(Evaluator, "evaluate", evaluate)
    monkeypatch.setattr(Evaluator, "reference", SimpleNamespace(acr=1.0))
    return make_toy_env()


def test_the_cheapest_map_that_keeps_a_share(env):
    judge = env.evaluator
    loose, strict = (cheapest(env, proposer(env), target) for target in (0.9, 0.99))
    assert env.default_budget.amount(loose.bit_widths) <= loose.budget < strict.budget
    for reached, target in ((loose, 0.9), (strict, 0.99)):
        assert reached.ratio == judge.evaluate(reached.bit_widths).acr >= target
        low, high = reached.interval
        assert low < reached.fresh_ratio < high and high - low < 1e-3 and reached.fresh_ratio != reached.ratio
        assert reached.evaluations == 1 + HALVINGS + DRAWS
        # 3% less is not enough, in the measure of the budget
        assert judge.evaluate(proposer(env)(reached.budget * 0.97)).acr < target


def test_targets_that_cannot_be_met(env):
    with pytest.raises(ArqError, match="ask for less"):
        cheapest(env, proposer(env), 1.5)
    with pytest.raises(ArqError, match="such as 0.99"):
        cheapest(env, proposer(env), 0.0)
    with pytest.raises(ArqError, match="one kind of cost"):
        cheapest(make_toy_env(budget={"bops": 0.03, "bytes": 100_000}), proposer(env), 0.9)
