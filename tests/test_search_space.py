"""Searches use what :class:`arq_env.search_space.SearchSpace` names, and nothing else of the environment."""

import gymnasium
import numpy as np
import pytest

from arq_agents.baselines import BASELINES
from arq_agents.haq import HaqEnv, cut_to_budget
from arq_agents.levers import demonstrations, effects_by_layer, exchange
from arq_env import ArqError
from arq_env.bitwidths import Bits
from arq_env.env import arq_env_of
from arq_env.search_space import SearchSpace
from tests.toy import make_toy_env

NAMES = {name for name in vars(SearchSpace) if not name.startswith("_")}


class Wall:
    """The environment with all else out of reach."""

    def __init__(self, env):
        self._env = env

    def __getattr__(self, name):
        assert name in NAMES, f"{name} is not for searches"
        return getattr(self._env, name)

    def __setattr__(self, name, value):
        assert name == "_env", "searches set nothing"
        super().__setattr__(name, value)


def test_every_search_stays_behind_the_wall():
    env = make_toy_env()
    wall, rng = Wall(env), np.random.default_rng(0)
    with pytest.raises(AssertionError, match="not for searches"):
        _ = wall.evaluator
    for search in BASELINES.values():
        proposals = search(wall, rng)
        assert env.default_budget.within(next(proposals))
    best = next(BASELINES["greedy"](wall, rng))
    assert env.default_budget.within(next(exchange(wall, {tuple(best.items()): 0.0})))
    assert effects_by_layer(wall).shape == (env.horizon, 6) and len(list(demonstrations(wall))) > 1
    assert env.default_budget.within(cut_to_budget({layer.name: Bits(8, 8) for layer in env.free_layers}, wall))
    published = HaqEnv(wall)
    published.reset()
    for _ in range(published.horizon):
        _, reward, terminated, _, info = published.step(np.zeros(1))
    found = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
    assert terminated and reward != info["reward"] == env.judge(found)["reward"]


def test_the_environment_is_a_search_space():
    """At run time, as the type checker says of :func:`arq_env.env.arq_env_of` where searches take it."""
    env = make_toy_env()
    assert all(hasattr(env, name) for name in NAMES) and len(NAMES) > 10


def test_wrapped_or_not():
    env = gymnasium.make("ARQ-Toy-v0")
    assert arq_env_of(env) is env.unwrapped is arq_env_of(env.unwrapped)
    with pytest.raises(ArqError, match="give one of this package"):
        arq_env_of(gymnasium.make("CartPole-v1"))
