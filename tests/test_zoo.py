"""rl_zoo3's configuration: plain data, which two models of one process do not share."""

import importlib
import json

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.buffers import NStepReplayBuffer

from arq_agents.algorithms import ALGORITHMS, WARM_UP_EPISODES, DecayingNoise, hyperparameters
from arq_agents.callbacks import ExplorationNoise
from arq_agents.methods import EPISODES
from arq_env.registration import ENVIRONMENTS, HORIZONS
from tests.own import arguments_of
from tests.toy import make_toy_env


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_configurations_are_plain_data_for_every_id(algorithm):
    configuration = importlib.import_module(f"arq_agents.zoo.{algorithm}").hyperparams
    assert list(configuration) == list(ENVIRONMENTS) and json.dumps(configuration)
    for name, settings in configuration.items():
        horizon = HORIZONS[name]
        assert gymnasium.make(name, **arguments_of(name)).unwrapped.horizon == horizon or name == "ARQ-Custom-v0"
        assert settings["n_steps"] == horizon
        assert settings["n_timesteps"] == EPISODES * horizon


def learn(algorithm, episodes, callback=None, **changes):
    """A model as rl_zoo3 builds one, trained on the toy."""
    settings = importlib.import_module(f"arq_agents.zoo.{algorithm}").hyperparams["ARQ-ResNet20-v0"]
    own = {key: value for key, value in settings.items() if key not in ("n_timesteps", "callback")}
    horizons = {"n_steps": 2, "learning_starts": 2 * WARM_UP_EPISODES - 0.5, "buffer_size": 4_000}
    model = ALGORITHMS[algorithm](env=make_toy_env(), seed=0, **own | horizons | changes)
    return model.learn(2 * episodes, callback)


def test_two_models_explore_alike():
    """Each has a noise of its own, from its own first episode on; one that a sweep has drawn stays."""
    first, second = (learn("td3", 25, ExplorationNoise()) for _ in range(2))
    assert first.action_noise is not second.action_noise and first.action_noise.episodes == second.action_noise.episodes == 25
    for mine, other in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        assert (mine == other).all()
    drawn = DecayingNoise(2, std=0.1)
    assert learn("ddpg", 1, ExplorationNoise(), action_noise=drawn).action_noise is drawn


def test_the_searches_own_hyperparameters_are_those():
    """With the callback's noise the configuration trains the agent that ``hyperparameters`` does."""
    configured = learn("td3", 25, ExplorationNoise())
    searched = ALGORITHMS["td3"]("MlpPolicy", make_toy_env(), seed=0, **hyperparameters("td3", 2)).learn(50)
    for mine, other in zip(configured.policy.parameters(), searched.policy.parameters(), strict=True):
        assert (mine == other).all()


@pytest.mark.parametrize("algorithm", ["td3", pytest.param("sac", marks=pytest.mark.slow)])
def test_n_steps_is_the_n_step_buffer_with_the_algorithm_s_gamma(algorithm):
    """So that a sweep's gamma has an effect, and SB3's argument changes nothing: equal parameters after 54 episodes."""
    model = learn(algorithm, 54)
    explicit = {"replay_buffer_class": NStepReplayBuffer, "replay_buffer_kwargs": {"n_steps": 2, "gamma": 1.0}, "n_steps": 1}
    for mine, other in zip(model.policy.parameters(), learn(algorithm, 54, **explicit).policy.parameters(), strict=True):
        assert (mine == other).all()
    discounted = learn(algorithm, 1, gamma=0.5)
    assert (discounted.gamma, discounted.replay_buffer.gamma, discounted.replay_buffer.n_steps) == (0.5, 0.5, 2)
    assert np.isfinite(discounted.replay_buffer.rewards).all()
