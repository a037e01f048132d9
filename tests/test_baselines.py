"""Every search beside the agents: within the budget, reproducible, resumable, and as good as its definition says."""

from dataclasses import replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from arq_agents.baselines import BASELINES, greedy, integer_program, least_sensitive, random, uniform_bits
from arq_agents.haq import EpisodeRewardBuffer, HaqEnv, absolute_bits, cut_to_budget
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import Bits, bops, bops_fraction, check_map, complete, free_layers, uniform
from arq_env.budget import BopsBudget
from arq_env.layers import Layer
from arq_env.sensitivity import places
from tests.toy import make_toy_env, outcome, search_toy

WIDTHS = range(2, 9)


def planned(tied: bool, fraction: float, seed: int):
    """A search space in name only: five layers of unequal cost, made-up sensitivities."""
    macs = (50, 400, 100, 300, 10)
    layers = tuple(
        Layer(f"l{i}", "conv", 8, 8, 9, 1, False, 64, m, 72, tied_to="l1" if tied and i == 3 else None) for i, m in enumerate(macs)
    )
    rng = np.random.default_rng(seed)
    table = {place: [*np.sort(rng.random(6) * 4.0 ** rng.integers(0, 3))[::-1].tolist(), 0.0] for place in places(layers)}
    return SimpleNamespace(
        layers=layers,
        free_layers=free_layers(layers),
        widths=range(2, 9),
        default_budget=BopsBudget(layers, fraction),
        sensitivities=table,
        complete=partial(complete, layers=layers),
    )


def total(env, bit_widths, activation_weight=1.0):
    return sum(
        values[getattr(bit_widths[name], kind) - 2] * (activation_weight if kind == "activation" else 1)
        for (name, kind), values in env.sensitivities.items()
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fraction, weight", [(0.008, 1.0), (0.02, 0.25), (0.03, 4.0)])
def test_the_integer_program_finds_the_optimum(tied, fraction, weight):
    """Against all 7^6 maps of three free layers."""
    env = planned(tied, fraction, seed=int(1000 * fraction))
    found = least_sensitive(env, env.sensitivities, weight)
    check_map(found, env.layers)
    assert bops_fraction(found, env.layers) <= fraction
    s = env.sensitivities
    zeros = [0.0] * 7
    loss = [
        np.add.outer(np.array(s[a.name, "weight"]), weight * np.array(s.get((a.name, "activation"), zeros)))
        for a in env.free_layers
    ]
    bits = np.array(list(product(WIDTHS, repeat=6))).reshape(-1, 3, 2)
    if tied:
        bits = bits[bits[:, 2, 1] == bits[:, 0, 1]]
    macs = np.array([layer.macs for layer in env.free_layers])
    ends = 64 * (env.layers[0].macs + env.layers[-1].macs)
    bits = bits[(macs * bits.prod(2)).sum(1) + ends <= env.default_budget.limit]
    best = sum(loss[i][bits[:, i, 0] - 2, bits[:, i, 1] - 2] for i in range(3)).min()
    assert total(env, found, weight) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_integer_program_stays_within_the_last_bit_operation(seed):
    """Also where the last layer, whose bits are fixed, reads what a free layer reads."""
    env = planned(False, 0.02, seed=seed)
    first, *rest, last = env.layers
    env.layers = (first, *rest, replace(last, tied_to="l2", macs=150))
    env.default_budget, env.complete = BopsBudget(env.layers, 0.02), partial(complete, layers=env.layers)
    found = least_sensitive(env, env.sensitivities)
    check_map(found, env.layers)
    assert bops(found, env.layers) <= env.default_budget.limit
    env.default_budget.limit = bops(found, env.layers) - 1
    assert bops(least_sensitive(env, env.sensitivities), env.layers) <= env.default_budget.limit


@pytest.mark.parametrize("tied", [False, True])
def test_greedy_takes_what_is_least_missed(tied):
    env = planned(tied, 0.02, seed=1)
    (found,) = greedy(env, None)
    check_map(found, env.layers)
    assert bops_fraction(found, env.layers) <= 0.02
    env.sensitivities = {place: [0.0] * 7 for place in env.sensitivities}
    dear = "l2", "weight"
    env.sensitivities[dear] = [6.0, 5, 4, 3, 2, 1, 0]
    (found,) = greedy(env, None)
    assert found["l2"].weight == 8 and found["l1"].weight < 8


def test_the_integer_program_repeats_no_map():
    env = planned(False, 0.02, seed=3)
    maps = list(integer_program(env, None))
    assert len(maps) > 1 and all(a != b for i, a in enumerate(maps) for b in maps[:i])


def test_uniform_bits_are_all_that_no_other_exceeds():
    env = make_toy_env()
    maps = list(uniform_bits(env, None))
    pairs = [tuple(m["deep"]) for m in maps]
    assert set(pairs) == {(2, 8), (3, 6), (4, 4), (6, 3), (8, 2)}
    assert all(bops_fraction(m, env.layers) <= 0.03 for m in maps)
    costs = [bops(m, env.layers) for m in maps]
    assert costs == sorted(costs, reverse=True)


def test_decode_is_what_steps_do():
    env = make_toy_env()
    rng = np.random.default_rng(0)
    for _ in range(20):
        actions = rng.uniform(-1.2, 1.2, (env.horizon, 2))
        env.reset()
        for action in actions:
            *_, info = env.step(action)
        assert dict(env.decode(actions)) == info["bit_widths"]
    with pytest.raises(ArqError, match="1 actions were given"):
        env.decode(actions[:1])
    with pytest.raises(ArqError, match="finite"):
        env.decode(np.full((env.horizon, 2), np.nan))


def test_coarse_bits_drive_predictions_away():
    env = make_toy_env()
    far = [env.evaluator.divergence(uniform(env.layers, bits, bits)) for bits in (2, 3, 8)]
    assert far[0] == max(far) and 0 <= far[2] < 0.2 * far[0]  # what BatchNorm's new estimates change is left at 8 bits
    assert make_toy_env().evaluator.divergence(uniform(env.layers, 2, 2)) == far[0]


def test_sensitivities_are_measured_once_and_fall():
    env = make_toy_env()
    table = env.evaluator.sensitivities
    assert env.evaluator.sensitivities is table and list(table) == places(env.layers)
    assert all(len(v) == 7 and v == sorted(v, reverse=True) and v[-1] == 0 for v in table.values())
    assert max(v[0] for v in table.values()) > 0


SLOWER = [*(name for name in BASELINES if name != "random"), "arq"]


@pytest.mark.parametrize("algorithm", ["random", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)])
def test_every_search_leaves_the_same_folder(tmp_path, algorithm):
    episodes = 22 if algorithm == "arq" else 8  # two after its warm-up
    best = search_toy(tmp_path / "a", algorithm, episodes)
    trace = read_trace(tmp_path / "a" / "trace.jsonl")
    assert 1 <= len(trace) <= episodes and all(e.bops_fraction <= 0.03 for e in trace)
    assert best.bit_widths in [e.bit_widths for e in trace]
    expected = {"config.json", "trace.jsonl", "tensorboard", "bit_widths.json"} | ({"agent.zip"} if algorithm == "arq" else set())
    assert {path.name for path in (tmp_path / "a").iterdir()} == expected
    cut = tmp_path / "b"
    search_toy(cut, algorithm, 5)
    search_toy(cut, algorithm, episodes)
    assert outcome(cut) == outcome(tmp_path / "a")
    if algorithm in ("random", "evolution", "parzen", "arq"):
        search_toy(tmp_path / "c", algorithm, episodes=5, seed=1)
        assert outcome(tmp_path / "c") != outcome(cut)[:5]


def test_tensorboard_shows_the_same_curves(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    search_toy(tmp_path, "random", episodes=3)
    rewards = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("1_reward/each_episode")
    assert [e.value for e in rewards] == pytest.approx([e.reward for e in read_trace(tmp_path / "trace.jsonl")])
    assert [e.step for e in rewards] == [1, 2, 3]


def test_random_actions_are_uniform():
    env, played = make_toy_env(), []
    env.decode = lambda actions: played.append(actions)
    proposals = random(env, np.random.default_rng(0))
    for _ in range(300):
        next(proposals)
    counts = np.histogram(np.array(played), 4, (-1, 1))[0]
    assert counts.sum() == 300 * env.horizon * 2 and (np.abs(counts / counts.sum() - 0.25) < 0.05).all()


def test_evolution_and_parzen_climb():
    """On a made-up reward both beat random search of the same length."""
    env = planned(False, 0.02, seed=5)
    env.decode = lambda actions: tuple(map(tuple, actions))
    best = {}
    for name in ("random", "evolution", "parzen"):
        proposals, reward, seen = BASELINES[name](env, np.random.default_rng(0)), None, []
        for _ in range(120):
            actions = proposals.send(reward)
            reward = -float(np.square(np.array(actions) - 0.4).sum())
            seen.append(reward)
        best[name] = max(seen)
    assert best["evolution"] > best["random"] and best["parzen"] > best["random"]


def test_the_reconstruction_decides_as_haq_does():
    assert [absolute_bits(a, (2, 3, 4, 5, 6, 7, 8)) for a in (0, 0.071, 0.2, 0.5, 0.999, 1)] == [2, 2, 3, 5, 8, 8]
    env = HaqEnv(make_toy_env())
    observation, _ = env.reset()
    assert env.observation_space.contains(observation) and env.horizon == 4
    for step in range(4):
        observation, reward, terminated, truncated, info = env.step(np.ones(1))
        assert env.observation_space.contains(observation) and (terminated, truncated) == (step == 3, False)
    common = env.base.judge({name: Bits(*bits) for name, bits in info["bit_widths"].items()})["reward"]
    assert info["bops_fraction"] <= 0.03 and info["reward"] == common != reward
    chosen = {layer.name: Bits(8, 8) for layer in env.free_layers}
    cut = cut_to_budget(chosen, env.base)
    first, last = (cut[layer.name] for layer in env.free_layers)
    assert sum(first) >= sum(last) and bops_fraction(cut, env.base.layers) <= 0.03
    small = {layer.name: Bits(2, 2) for layer in env.free_layers}
    assert cut_to_budget(small, env.base) == complete(small, env.base.layers)


def test_an_episode_shares_its_reward():
    env = HaqEnv(make_toy_env())
    buffer = EpisodeRewardBuffer(10, env.observation_space, env.action_space, device="cpu")
    row, no = np.zeros((1, 10)), np.zeros((1, 1))
    for episode, reward in enumerate((2.0, -1.0, 5.0)):
        for step in range(4):
            last = step == 3
            buffer.add(row, row, no, np.array([reward if last else 0.0]), np.array([last]), [{}])
        assert episode != 0 or buffer.rewards[:4, 0].tolist() == [2.0] * 4
    assert buffer.rewards[:, 0].tolist() == [5.0, 5.0, 2.0, 2.0, -1.0, -1.0, -1.0, -1.0, 5.0, 5.0]  # wrapped around
    assert abs(buffer.sample(64).rewards.mean()) < 1e-6
