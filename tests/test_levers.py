"""What can be added to a search."""

import json

import numpy as np
import pytest
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_checker import check_env

from arq_agents.algorithms import build_agent
from arq_agents.baselines import greedy, integer_program
from arq_agents.haq import HaqEnv
from arq_agents.levers import changes, demonstrate, demonstrations, exchange, seen_with
from arq_agents.methods import split_method
from arq_agents.recorder import Recorder
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import MIN_BITS, bops, bops_fraction
from arq_env.env import REWARD_SCALE
from tests.toy import make_toy_env, outcome, search_toy


@pytest.mark.parametrize(
    "method, message",
    [
        ("td4", "no search 'td4'"),
        ("td3+luck", "nothing called 'luck'"),
        ("random+features", "cannot be added to random"),
        ("arq+demonstrations", "cannot be added to arq"),
        ("sac+steadynoise", "only to ddpg, td3"),
    ],
)
def test_unknown_methods(tmp_path, method, message):
    with pytest.raises(ArqError, match=message):
        search_toy(tmp_path, method)
    assert split_method("td3+features+exchange") == ("td3", ("features", "exchange"))


def test_features_are_those_of_the_layer_at_hand():
    env = seen_with(("onehot", "features"), make_toy_env())
    base, table = env.unwrapped, env.unwrapped.evaluator.sensitivities
    seen = [env.reset()[0]]
    for _ in range(base.horizon):
        seen.append(env.step(np.zeros(2))[0])
    rows = np.array(seen)[:, -6:]
    assert (rows[-1] == rows[-2]).all() and rows.max() == 1 and rows.min() >= 0
    effects = [
        table[layer.name, kind][bits] for layer in base.free_layers for kind in ("weight", "activation") for bits in range(3)
    ]
    assert (np.diff(rows[:-1].ravel()[np.argsort(effects)]) >= 0).all()  # the same order, on a scale of its own
    assert (np.array(seen)[:-1, 15 : 15 + base.horizon] == np.eye(base.horizon)).all()
    check_env(env, skip_render_check=True)


@pytest.mark.slow
def test_defaults_can_be_taken_away(tmp_path):
    search_toy(tmp_path / "as it is", "td3", 3)
    search_toy(tmp_path / "changed", "td3+onestep+onegradient+steadynoise", 3)
    settings, changed = (json.loads((tmp_path / f / "config.json").read_text())["hyperparameters"] for f in ("as it is", "changed"))
    search_toy(tmp_path / "shown", "td3+demonstrations", 12)
    shown = json.loads((tmp_path / "shown" / "config.json").read_text())["hyperparameters"]
    assert shown["learning_starts"] == shown["action_noise"]["warm_up"] == 0 < settings["learning_starts"]
    differing = {key for key in settings if settings[key] != changed[key]}
    assert differing == {"n_steps", "gradient_steps", "action_noise"} and settings.keys() == changed.keys()
    assert changed["gradient_steps"] == 1 and changed["action_noise"]["decay"] == 1
    env = make_toy_env()
    agent = build_agent("td3", env, seed=0, device="cpu", **changes(("onestep", "onegradient", "steadynoise")))
    assert (agent.n_steps, agent.gradient_steps, agent.action_noise.decay) == (1, 1, 1.0)
    assert type(agent.replay_buffer) is ReplayBuffer
    as_it_is = build_agent("td3", env, seed=0, device="cpu")
    assert as_it_is.replay_buffer.n_steps == env.horizon and as_it_is.replay_buffer.gamma == 1


def test_a_reward_without_its_scale():
    base, env = make_toy_env(), seen_with(("unscaled",), make_toy_env())
    ends = []
    for each in (base, env):
        each.reset()
        for _ in range(base.horizon):
            _, reward, _, _, info = each.step(np.zeros(2))
        ends.append((reward, info["reward"]))
    assert ends[1] == (ends[0][0] / REWARD_SCALE, ends[0][1]) and ends[0][0] != 0


def test_the_published_reward_in_place_of_the_environment_s():
    env, alone = seen_with(("incremental", "unscaled"), make_toy_env()), HaqEnv(make_toy_env())
    env.reset()
    rewards = [env.step(np.zeros(2))[1] for _ in range(env.unwrapped.horizon - 1)]
    _, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert not any(rewards) and terminated and not truncated
    bits = [bits for layer in alone.free_layers for bits in info["bit_widths"][layer.name]]
    alone.reset()
    for one in bits:
        _, published, *_, judged = alone.step(np.array([(one - MIN_BITS + 0.5) / 7 * 2 - 1]))
    assert judged["bit_widths"] == info["bit_widths"] and judged["reward"] == info["reward"]
    assert reward == published / REWARD_SCALE != info["reward"] / REWARD_SCALE


@pytest.mark.parametrize("budget", [0.02, 0.03, 0.05])
def test_encode_undoes_decode(budget):
    env, rng = make_toy_env(budget=budget), np.random.default_rng(0)
    for _ in range(50):
        bit_widths = env.decode(rng.uniform(-1, 1, (env.horizon, 2)))
        actions = env.encode(bit_widths)
        assert env.decode(actions) == bit_widths and actions.dtype == np.float32 and np.abs(actions).max() <= 1


def test_demonstrations_are_in_the_replay_buffer(tmp_path):
    env = make_toy_env()
    agent = build_agent("td3", env, seed=0, device="cpu", warm_up=0)
    (tmp_path / "config.json").write_text("{}")
    with Recorder(tmp_path, env.layers, 100, progress=False) as recorder:
        agent.set_logger(recorder.logger)
        demonstrate(agent, recorder, demonstrations(env))
        played = [env.decode(env.encode(m)) for m in (*integer_program(env, None), *greedy(env, None))]
        assert [episode.bit_widths for episode in recorder.done] == played
        ends = np.flatnonzero(agent.replay_buffer.dones[:, 0])
        assert ends.tolist() == [(i + 1) * env.horizon - 1 for i in range(len(played))]
        assert agent.replay_buffer.rewards[ends, 0] == pytest.approx([episode.reward for episode in recorder.done])


def test_exchange_climbs_within_the_budget():
    """On a made-up reward with one summit, which it reaches."""
    env = make_toy_env()
    start = env.decode(np.zeros((env.horizon, 2)))
    wish = env.decode(np.tile([-1.0, 1.0], (env.horizon, 1)))

    def reward(bit_widths):
        return -sum(abs(a - b) for name in wish for a, b in zip(bit_widths[name], wish[name], strict=True))

    known = {tuple(start.items()): reward(start)}
    proposals, told, met = exchange(env, known), None, 0
    for _ in range(400):
        try:
            bit_widths = proposals.send(told)
        except StopIteration:
            break
        assert tuple(bit_widths.items()) not in known and bops_fraction(bit_widths, env.layers) <= 0.03
        told, met = reward(bit_widths), met + 1
    assert max(known.values()) == 0 > reward(start) and len(known) == met + 1


def test_exchange_tries_what_seems_to_cost_least_first():
    env = make_toy_env()
    start = next(integer_program(env, None))
    effects = env.evaluator.sensitivities.items()
    first = next(exchange(env, {tuple(start.items()): 0.0}))
    changed = [(name, kind) for name in start for kind in (0, 1) if first[name][kind] != start[name][kind]]
    assert 1 <= len(changed) <= 2 and bops(first, env.layers) <= env.default_budget.limit

    def total(bit_widths):
        return sum(effect[getattr(bit_widths[name], kind) - MIN_BITS] for (name, kind), effect in effects)

    assert total(first) >= total(start)


@pytest.mark.parametrize(
    "method",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("td3+onehot", "td3+features", "sac+demonstrations")),
        pytest.param("sac+incremental", marks=pytest.mark.slow),
        pytest.param("ddpg+features+demonstrations+exchange", marks=pytest.mark.slow),
        "random+exchange",
    ],
)
def test_a_killed_search_ends_the_same(tmp_path, method, monkeypatch):
    monkeypatch.setattr("arq_agents.search.EXCHANGES", 5)
    search_toy(tmp_path / "whole", method, 28)
    trace = tmp_path / "cut" / "trace.jsonl"
    search_toy(tmp_path / "cut", method, 28)
    kept = trace.read_text().splitlines(keepends=True)[:15]
    (tmp_path / "cut" / "bit_widths.json").unlink()
    trace.write_text("".join(kept))
    search_toy(tmp_path / "cut", method, 28)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole") and len(read_trace(trace)) == 28
    assert all(episode.bops_fraction <= 0.03 for episode in read_trace(trace))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["algorithm"] == method


def test_exchange_must_leave_an_agent_something_to_learn_from(tmp_path):
    with pytest.raises(ArqError, match="70 episodes leave none to learn from"):
        search_toy(tmp_path, "td3+demonstrations+exchange", 70)
    assert not list(tmp_path.iterdir())


def test_curves_go_on_after_demonstrations(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    search_toy(tmp_path, "sac+demonstrations", 14)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("1_reward/each_episode")] == list(range(1, 15))


def test_a_search_that_ends_in_exchanges_cannot_be_made_longer(tmp_path):
    search_toy(tmp_path, "integer_program+exchange", 12)
    with pytest.raises(ArqError, match="differs in episodes"):
        search_toy(tmp_path, "integer_program+exchange", 13)
