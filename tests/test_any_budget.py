"""One agent for every budget."""

import numpy as np
import pytest
from stable_baselines3 import TD3
from stable_baselines3.common.env_checker import check_env

from agents.algorithms import WARM_UP_EPISODES
from agents.any_budget import DrawnBudget, export_budgets, map_for_budget, train_for_any_budget
from agents.baselines import least_sensitive
from agents.levers import seen_with
from agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import bops_fraction, uniform
from arq_env.budget import BopsBudget
from tests.toy import make_toy_env

LOW, HIGH = 0.02, 0.06
EPISODES = WARM_UP_EPISODES + 4


def run(folder, episodes=EPISODES, algorithm="td3", **changes):
    options = {"episodes": episodes, "folder": folder, "progress": False} | changes
    return train_for_any_budget(algorithm, make_toy_env(), (LOW, HIGH), **options)


def test_budgets_are_drawn_evenly_on_a_log_scale():
    env = DrawnBudget(make_toy_env(), LOW, HIGH)
    env.reset(seed=0)
    drawn = []
    for _ in range(300):
        env.reset()
        drawn.append(env.unwrapped.budget.fraction)
    places = np.log(np.array(drawn) / LOW) / np.log(HIGH / LOW)
    assert places.min() > 0 and places.max() < 1
    assert np.histogram(places, 4, (0, 1))[0].min() > 50
    env.reset(seed=0)
    assert env.reset() and env.unwrapped.budget.fraction == drawn[0]
    env.reset(options={"budget": 0.03})
    assert env.unwrapped.budget.fraction == 0.03


def test_the_reward_is_relative_to_uniform_bits():
    env = DrawnBudget(make_toy_env(), LOW, HIGH)
    base = env.unwrapped
    costs, rewards = env.uniform_rewards
    three = uniform(base.layers, 3, 3)
    exactly = bops_fraction(three, base.layers)
    assert rewards[1] == base.judge(three)["reward"] and np.exp(costs[-1]) > HIGH > np.exp(costs[-2])
    env.reset(options={"budget": exactly})
    for _ in range(base.horizon):
        _, reward, terminated, _, info = env.step(np.zeros(2))
    assert terminated and dict(info["bit_widths"]) == {name: tuple(bits) for name, bits in three.items()}
    assert reward == pytest.approx(0) and info["reward"] == rewards[1]
    check_env(env, skip_render_check=True)


def test_one_agent_answers_for_every_budget(tmp_path):
    agent = run(tmp_path / "a")
    trace = read_trace(tmp_path / "a" / "trace.jsonl")
    assert len(trace) == EPISODES and np.ptp([e.bops_fraction for e in trace]) > 0.01
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"config.json", "trace.jsonl", "tensorboard", "agent.zip"}
    env = make_toy_env()
    for budget in (LOW, 0.03, HIGH):
        info = map_for_budget(agent, env, budget)
        assert info["bops_fraction"] <= budget and np.isfinite(info["reward"])
    # what is on disk is that agent; killed and resumed it is the same one
    again = TD3.load(tmp_path / "a" / "agent.zip")
    run(tmp_path / "b", episodes=WARM_UP_EPISODES + 1)
    resumed = run(tmp_path / "b")
    for other in (again, resumed):
        for mine, theirs in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
            assert (mine == theirs).all()


def test_it_can_learn_from_the_integer_program_s_maps_at_many_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.any_budget.DEMONSTRATED", 3)
    agent = run(tmp_path, 12, "td3+features+demonstrations")
    env, shown = make_toy_env(), read_trace(tmp_path / "trace.jsonl")[:9]
    for start, fraction in zip((0, 3, 6), np.geomspace(LOW, HIGH, 3), strict=True):
        best = least_sensitive(env, env.evaluator.sensitivities, 1.0, BopsBudget(env.layers, fraction))
        env.reset(options={"budget": fraction})
        played = [env.step(action) for action in env.encode(best)][-1][-1]["bit_widths"]
        assert shown[start].bit_widths == played and shown[start].bops_fraction <= fraction
    assert map_for_budget(agent, seen_with(("features",), env), 0.03)["bops_fraction"] <= 0.03
    with pytest.raises(ArqError, match="sees another network's layers"):
        export_budgets(agent, env, "td3+onehot", [0.03], tmp_path)
    for algorithm in ("td3+exchange", "td3+incremental", "random"):
        with pytest.raises(ArqError, match="without exchange and without incremental"):
            run(tmp_path / "b", algorithm=algorithm)


def test_budgets_out_of_order(tmp_path):
    with pytest.raises(ArqError, match="low first"):
        DrawnBudget(make_toy_env(), 0.03, 0.02)
    with pytest.raises(ArqError, match="least reachable"):
        DrawnBudget(make_toy_env(), 0.001, 0.02)
    run(tmp_path, episodes=2)
    with pytest.raises(ArqError, match="budgets"):
        train_for_any_budget("td3", make_toy_env(), (LOW, 0.05), episodes=2, folder=tmp_path, progress=False)
