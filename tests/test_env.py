import copy
import dataclasses
import functools
import inspect
import json
import math
import pickle
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env

from arq_env import ArqError
from arq_env.bitwidths import Bits, bops_fraction, uniform
from arq_env.env import REWARD_SCALE, make_env
from arq_env.evaluation import CertifierSettings
from arq_env.registration import ENVIRONMENTS, register_all
from tests.hostile import hostile
from tests.own import arguments_of
from tests.toy import make_toy_env, toy_problem

IDS = [*ENVIRONMENTS, "ARQ-Toy-v0"]


def play(env, action=None, seed=0):
    """A whole episode with one action, or random ones; returns what the last step returned."""
    observation, info = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    assert info == {}
    done = False
    while not done:
        assert observation in env.observation_space
        chosen = rng.uniform(-1, 1, 2).astype(np.float32) if action is None else np.float32(action)
        observation, reward, done, truncated, info = env.step(chosen)
        assert type(reward) is float and type(done) is bool and truncated is False
        assert done or (reward == 0 and info == {})
    assert observation in env.observation_space
    return reward, info


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("render_mode", ["ansi", pytest.param("rgb_array", marks=pytest.mark.slow)])
def test_checkers_find_nothing(name, render_mode):
    env = gymnasium.make(name, render_mode=render_mode, **arguments_of(name)).unwrapped
    gymnasium_check_env(env)
    sb3_check_env(env)
    env.close()
    env.close()


@pytest.mark.parametrize("name", IDS)
def test_spec_survives_json(name):
    env = gymnasium.make(name, **arguments_of(name) | {"budget": 0.05})
    spec = gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert gymnasium.make(spec).unwrapped.default_budget.value == 0.05


def test_registering_twice_is_harmless_and_import_is_light():
    register_all()
    code = "import sys, arq_env, gymnasium; assert 'torch' not in sys.modules; gymnasium.spec('ARQ-ResNet20-v0')"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_resnet20_walks_eighteen_layers_and_loads_nothing(monkeypatch):
    monkeypatch.setattr("arq_env.problem.load_dataset", lambda name: pytest.fail("data were loaded"))
    env = gymnasium.make("ARQ-ResNet20-v0").unwrapped
    env.reset()
    for _ in range(17):
        assert not env.step(np.zeros(2))[2]


def test_last_step_tells_all(toy_env):
    reward, info = play(toy_env)
    assert set(info) == {
        "reward",
        "bit_widths",
        "bits",
        "bops_fraction",
        "acr",
        "clean_accuracy",
        "certified_accuracy",
        "reference_acr",
        "evaluation_seconds",
    }
    assert list(info["bit_widths"]) == [layer.name for layer in toy_env.layers]
    assert info["bit_widths"]["first"] == info["bit_widths"]["last"] == (8, 8)
    assert info["bops_fraction"] <= 0.03
    assert reward == pytest.approx(REWARD_SCALE * (info["acr"] / info["reference_acr"] - 1))
    assert 0 < info["reference_acr"] < 2 and 0 <= info["certified_accuracy"] <= info["clean_accuracy"] <= 1
    bits = info.pop("bits")
    assert bits.dtype == np.int64 and bits.tolist() == [list(pair) for pair in info["bit_widths"].values()]
    json.dumps(info)


def test_random_maps_stay_within_the_budget(toy_env):
    toy_env.evaluator.evaluate = lambda bit_widths: toy_env.evaluator.reference
    for seed in range(30):
        fraction = np.random.default_rng(seed).uniform(0.019, 0.05)
        toy_env.reset(options={"budget": fraction})
        rng, done = np.random.default_rng(seed), False
        while not done:
            _, _, done, _, info = toy_env.step(rng.uniform(-1, 1, 2))
        assert info["bops_fraction"] <= fraction


def test_zero_is_an_even_share():
    problem = toy_problem()
    budget = bops_fraction(uniform(problem.layers, 5, 5), problem.layers)
    _, info = play(make_toy_env(budget=budget), action=(0, 0))
    assert info["bit_widths"]["middle"] == info["bit_widths"]["deep"] == (5, 5)


@pytest.mark.slow
def test_reward_orders_networks():
    """On the shipped network, 8 bits are as good as FP32 and 2 bits clearly worse."""
    env = gymnasium.make("ARQ-ResNet20-Signs-v0", images=128).unwrapped

    def reward(bits):
        return REWARD_SCALE * (env.evaluator.evaluate(uniform(env.layers, bits, bits)).acr / env.evaluator.reference.acr - 1)

    assert abs(reward(8)) < 0.5
    assert reward(2) < -1


def test_budget_for_one_episode(toy_env):
    generous, _ = toy_env.reset(options={"budget": 0.06})
    default, _ = toy_env.reset()
    assert generous[11] > default[11] and generous[12] > default[12]
    with pytest.raises(ArqError, match="least reachable"):
        toy_env.reset(options={"budget": 0.001})
    with pytest.raises(ArqError, match="'budgets'"):
        toy_env.reset(options={"budgets": 0.02})


def test_infeasible_budget_fails_at_construction():
    with pytest.raises(ArqError, match="least reachable"):
        gymnasium.make("ARQ-ResNet20-v0", budget=0.001)


def test_observation_tells_what_is_left(toy_env):
    toy_env.reset()
    frugal = toy_env.step(np.array([-1, -1]))[0]
    toy_env.reset()
    lavish = toy_env.step(np.array([1, 1]))[0]
    assert frugal[12] > lavish[12] and frugal[13] < lavish[13]
    assert not np.shares_memory(frugal, lavish)


def test_a_map_is_evaluated_once(toy_env):
    calls = []
    quantize = toy_env.evaluator.quantizer.quantize
    toy_env.evaluator.quantizer.quantize = lambda bits, **how: calls.append(bits) or quantize(bits, **how)
    (reward, first), (again, second) = play(toy_env, (0, 0)), play(toy_env, (0, 0))
    assert not np.shares_memory(first.pop("bits"), second.pop("bits"))
    assert (reward, first) == (again, second) and len(calls) == 1
    play(toy_env, (-1, -1))
    assert len(calls) == 2


def test_evaluation_is_reproducible_and_leaves_global_generators_alone():
    import torch

    results = []
    for _ in range(2):
        env = make_toy_env()
        np.random.seed(3)
        torch.manual_seed(3)
        results.append(play(env)[0])
        assert np.random.random() == np.random.RandomState(3).random()
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    assert results[0] == results[1]


@pytest.mark.parametrize("action", [(math.nan, 0), (0, math.inf)])
def test_actions_that_are_no_numbers(toy_env, action):
    toy_env.reset()
    with pytest.raises(ArqError, match="finite"):
        toy_env.step(np.array(action))


def test_actions_beyond_the_bounds_are_clipped(toy_env):
    assert play(toy_env, (5, -5))[1]["bit_widths"] == play(toy_env, (1, -1))[1]["bit_widths"]


def test_a_large_budget_leaves_a_choice():
    env = make_toy_env(budget=1.0)
    assert play(env, (0, 0))[1]["bit_widths"]["middle"] == (8, 8)
    assert play(env, (-1, -1))[1]["bit_widths"]["middle"] == (7, 7)


def test_what_is_fixed_is_seen_and_kept():
    env = make_toy_env(fix={"first": "4/4", "last": "8/8"})
    assert play(env, (0, 0))[1]["bit_widths"]["first"] == (4, 4)
    assert env.reset()[0][13:15].tolist() == [0.5, 0.5]  # the layer before the first free one has them
    assert make_toy_env(fix={}).horizon == env.horizon + 2


def test_a_whole_episode_on_the_embedded_data():
    env = gymnasium.make("ARQ-ResNet20-Signs-v0", images=32).unwrapped
    reward, info = play(env, (0, 0))
    assert len(info["bit_widths"]) == 20 and -10 <= reward < 5
    assert info["bops_fraction"] <= 1 / 64


def test_stepping_on_after_the_end(toy_env):
    play(toy_env)
    with pytest.raises(gymnasium.error.ResetNeeded):
        toy_env.step(np.zeros(2))


def test_render_shows_the_map():
    env = make_toy_env(render_mode="ansi")
    env.reset()
    env.step(np.zeros(2))
    lines = env.render().splitlines()
    assert len(lines) == 4 and lines[0].startswith("first") and "8/8" in lines[0] and "-/-" in lines[2]
    env.render_mode = "rgb_array"
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.std() > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sigma": 0}, "sigma"),
        ({"sigma": -0.5}, "sigma"),
        ({"sigma": "0.5"}, "sigma"),
        ({"sigma": 3.0}, "resnet20-cifar10-sigma0.5-gaussian"),
        ({"training": "magic"}, "resnet20-cifar10-sigma0.5-gaussian"),
        ({"budget": 2}, "fraction"),
        ({"device": "nowhere"}, "cpu or cuda"),
        ({"n": 0}, "n is 0"),
        ({"images": -1}, "images is -1"),
        ({"alpha": 2}, "alpha"),
        ({"images": True}, "images is True"),
        ({"regained_bits": 7}, "regained_bits is 7"),
        ({"n": 10**9}, "from 1 to 10,000,000"),
        ({"fix": {"first": 8}}, "fix has 8 for 'first'"),
        ({"bits": [4, 9]}, "give a list of whole numbers from 2 to 8"),
        ({"sigma": True}, "sigma is True"),
        ({"device": "meta"}, "cpu or cuda"),
        ({"network": None}, "network is None"),
        ({"render_mode": "film"}, "ansi, rgb_array"),
        ({"render_mode": 5}, "ansi, rgb_array"),
        ({"imagse": 8}, "no argument 'imagse': choose of .*images"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, message):
    with pytest.raises(ArqError, match=message):
        gymnasium.make("ARQ-ResNet20-v0", **arguments)


def odd_values():
    """What a user may pass by mistake."""
    numbers = st.integers() | st.floats() | st.floats(width=32).map(np.float32) | st.integers(-9, 9).map(np.int64) | st.booleans()
    plain = st.none() | numbers | st.complex_numbers() | st.text(max_size=200) | st.binary(max_size=3)
    arrays = hnp.arrays(
        st.sampled_from([float, int, bool, complex, "U2", object]), hnp.array_shapes(min_dims=0, max_dims=3, max_side=3)
    )
    return plain | arrays | st.lists(plain, max_size=3) | st.dictionaries(st.text(max_size=6), plain, max_size=2)


def told(call) -> str:
    """The message of the error that a call ends in, which is the user's; empty where it ends well."""
    try:
        call()
    except (ArqError, gymnasium.error.Error) as error:
        return str(error)
    return ""


ARGUMENTS = (*inspect.signature(make_env).parameters, *(field.name for field in dataclasses.fields(CertifierSettings)), "problem")


@hostile
@given(st.sampled_from(sorted({*ARGUMENTS} - {"settings"})), odd_values())
def test_no_argument_ends_in_a_bare_error(name, value):
    assert "\n" not in told(lambda: gymnasium.make("ARQ-ResNet20-Signs-v0", disable_env_checker=True, **{name: value}))


@hostile
@given(odd_values(), odd_values())
def test_no_reset_and_no_step_ends_in_a_bare_error(value, other):
    env = TOY()
    for call in (
        lambda: env.reset(options=value),
        lambda: env.reset(options={"budget": value}),
        lambda: env.reset(seed=value),
        lambda: env.step(value),
        lambda: env.step([value, other]),
    ):
        env.reset()
        message = told(call)
        assert "\n" not in message and (not message or env.step_count == 0)


@functools.cache
def TOY():
    return make_toy_env()


@pytest.mark.parametrize(
    "action", [None, "ab", ["0.5", "1"], 0.5, [0], [0, 0, 0], [[0, 0]], [[0], [0]], [True, False], [1j, 0], {}]
)
def test_actions_of_another_kind(toy_env, action):
    toy_env.reset()
    with pytest.raises(ArqError, match="two finite numbers"):
        toy_env.step(action)
    assert toy_env.step_count == 0 and not toy_env.step([0, 0])[2]


def test_an_environment_is_pickled_with_what_it_has_measured(toy_env):
    """And without what it can make again; the toy problem's load is a function that can be named."""
    for again in (lambda env: pickle.loads(pickle.dumps(env)), copy.deepcopy):
        play(toy_env, (0, 0))
        assert toy_env.evaluator.sensitivities and toy_env.evaluator.quantizer
        toy_env.problem.__dict__.pop("dataset", None)
        size, fresh = len(pickle.dumps(toy_env)), len(pickle.dumps(make_toy_env()))
        assert size < fresh + 20_000
        twin = again(toy_env)
        twin.evaluator.measure = lambda build: pytest.fail("measured again")
        assert play(twin, (0, 0))[0] == play(toy_env, (0, 0))[0]
        assert twin.evaluator.sensitivities == toy_env.evaluator.sensitivities
        del twin.evaluator.measure
        assert play(twin, (-1, 1))[0] == play(toy_env, (-1, 1))[0]


def test_frames_have_a_title_and_human_is_gymnasiums_window(monkeypatch):
    shown = []
    monkeypatch.setattr("gymnasium.wrappers.HumanRendering._render_frame", lambda self: shown.append(self.env.render()))
    env = gymnasium.make("ARQ-ResNet20-Signs-v0", render_mode="human", disable_env_checker=True)
    assert env.render_mode == "human" and env.spec.kwargs["render_mode"] == "human"
    env.reset()
    env.step(np.zeros(2, np.float32))
    assert len(shown) == 2 and not np.array_equal(*(frame[:40] for frame in shown))  # the title counts layers
    again = gymnasium.make(env.spec)
    assert again.render_mode == "human" and "HumanRendering" in str(again)


def test_vectorised_by_gymnasium():
    """The map stacks; ``TimeAwareObservation`` wants the number of steps."""
    envs = gymnasium.make_vec("ARQ-Toy-v0", num_envs=2, vectorization_mode="sync")
    envs.reset(seed=0)
    for _ in range(2):
        *_, infos = envs.step(np.zeros((2, 2), np.float32))
    assert infos["bits"].shape == (2, 4, 2) and infos["bits"].dtype == np.int64
    assert (infos["bits"][0] == infos["bits"][1]).all() and (infos["bits"][:, 0] == 8).all()
    envs.close()
    timed = gymnasium.wrappers.TimeAwareObservation(gymnasium.make("ARQ-Toy-v0", max_episode_steps=2))
    assert timed.reset()[0].shape == (16,)


def test_vectorised():
    env = make_vec_env("ARQ-Toy-v0", n_envs=2, seed=0)
    env.reset()
    _, _, dones, _ = env.step(np.zeros((2, 2)))
    _, rewards, dones, infos = env.step(np.zeros((2, 2)))
    assert dones.all() and rewards[0] == rewards[1] and "terminal_observation" in infos[0]
    env.close()


def test_bits_are_integers_of_python(toy_env):
    _, info = play(toy_env)
    assert all(type(bit) is int for bits in info["bit_widths"].values() for bit in Bits(*bits))


@pytest.mark.parametrize("sigma", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("training", ["gaussian", "consistency"])
def test_checkpoints_are_picked_by_sigma_and_training(sigma, training):
    problem = gymnasium.make("ARQ-ResNet20-v0", sigma=sigma, training=training).unwrapped.problem
    assert (problem.card["sigma"], problem.card["training"], problem.sigma) == (sigma, training, sigma)


def test_an_unknown_pair_names_those_there_are():
    with pytest.raises(ArqError, match="resnet20-cifar10-sigma0.25-gaussian, .*resnet20-cifar10-sigma1-consistency"):
        gymnasium.make("ARQ-ResNet20-v0", sigma=0.75, training="gaussian")
