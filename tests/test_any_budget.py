"""One agent for every budget."""

import base64
import json
import pickle
import shutil
import zipfile

import gymnasium
import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env
from torch import nn

from arq_agents.algorithms import WARM_UP_EPISODES
from arq_agents.any_budget import DrawnBudget, export_budgets, learned_on, load_agent, map_for_budget, train_for_any_budget
from arq_agents.baselines import least_sensitive
from arq_agents.levers import seen_with
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import bops_fraction, uniform
from arq_env.budget import BopsBudget
from arq_env.env import ArqEnv
from tests.toy import ToyNet, make_toy_env, search_toy, toy_problem

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
        drawn.append(env.unwrapped.budget.value)
    places = np.log(np.array(drawn) / LOW) / np.log(HIGH / LOW)
    assert places.min() > 0 and places.max() < 1
    assert np.histogram(places, 4, (0, 1))[0].min() > 50
    env.reset(seed=0)
    assert env.reset() and env.unwrapped.budget.value == drawn[0]
    env.reset(options={"budget": 0.03})
    assert env.unwrapped.budget.value == 0.03


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


@pytest.mark.slow
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
    again, algorithm = load_agent(tmp_path / "a", env)
    assert algorithm == "td3"
    run(tmp_path / "b", episodes=WARM_UP_EPISODES + 1)
    resumed = run(tmp_path / "b")
    for other in (again, resumed):
        for mine, theirs in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
            assert (mine == theirs).all()


@pytest.mark.slow
def test_it_can_learn_from_the_integer_program_s_maps_at_many_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr("arq_agents.any_budget.DEMONSTRATED", 3)
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


class Bomb:
    """What a pickle can do when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_an_agent_is_read_without_running_what_is_in_it(tmp_path):
    """A crafted entry, as SB3 writes its settings or torch its tensors, creates no file."""
    run(tmp_path / "a", episodes=2)
    env, bomb = make_toy_env(), pickle.dumps(Bomb(tmp_path / "ran"), protocol=2)
    pickle.loads(bomb).close()
    (tmp_path / "ran").unlink()
    with zipfile.ZipFile(tmp_path / "a" / "agent.zip") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    settings = json.loads(parts["data"]) | {"lr_schedule": {":type:": "x", ":serialized:": base64.b64encode(bomb).decode()}}
    for number, (name, content) in enumerate((("data", json.dumps(settings)), ("policy.pth", bomb), ("evil.pth", bomb))):
        crafted = shutil.copytree(tmp_path / "a", tmp_path / str(number))
        with zipfile.ZipFile(crafted / "agent.zip", "w") as archive:
            for part, bytes_ in (parts | {name: content}).items():
                archive.writestr(part, bytes_)
        if name == "data":
            agent, _ = load_agent(crafted, env)
            assert map_for_budget(agent, env, 0.03) is not None
        else:
            with pytest.raises(ArqError, match="holds no agent that can be read"):
                load_agent(crafted, env)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_damaged_agent_is_an_error(tmp_path, content):
    (tmp_path / "config.json").write_text(json.dumps({"algorithm": "td3", "budgets": [0.02, 0.06]}))
    if content is not None:
        (tmp_path / "agent.zip").write_bytes(content)
    with pytest.raises(ArqError, match="holds no agent that can be read"):
        load_agent(tmp_path, make_toy_env())


@pytest.mark.slow
def test_an_agent_of_one_budget_is_none_for_all(tmp_path):
    search_toy(tmp_path, "td3", 2)
    with pytest.raises(ArqError, match="holds no agent for all budgets"):
        load_agent(tmp_path, make_toy_env())


def test_an_agent_that_sees_its_layers_one_by_one(tmp_path):
    run(tmp_path, 2, "td3+onehot")
    problem = toy_problem(network=ToyNet().eval())
    load_agent(tmp_path, ArqEnv(problem, budget=LOW))
    problem.network.deep = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    with pytest.raises(ArqError, match="another network's layers"):
        load_agent(tmp_path, ArqEnv(toy_problem(network=problem.network.eval()), budget=HIGH))


@pytest.mark.slow
def test_budgets_that_are_nearly_the_same_have_folders_of_their_own(tmp_path):
    agent = run(tmp_path, episodes=2)
    export_budgets(agent, make_toy_env(), "td3", [0.0300001, 0.03, 0.030000000000000002], tmp_path)
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"0.0300001", "0.03", "0.030000000000000002"}


@pytest.mark.parametrize(
    "wrong", [{"options": 5}, {"options": [("budget", 0.03)]}, {"options": {"budget": 0}}, {"seed": "x"}, {"seed": -1}]
)
def test_drawing_mistakes(wrong):
    with pytest.raises((ArqError, gymnasium.error.Error)):
        DrawnBudget(make_toy_env(), LOW, HIGH).reset(**wrong)


def test_budgets_out_of_order(tmp_path):
    with pytest.raises(ArqError, match="low first"):
        DrawnBudget(make_toy_env(), 0.03, 0.02)
    with pytest.raises(ArqError, match="least reachable"):
        DrawnBudget(make_toy_env(), 0.001, 0.02)
    run(tmp_path, episodes=2)
    with pytest.raises(ArqError, match="budgets"):
        train_for_any_budget("td3", make_toy_env(), (LOW, 0.05), episodes=2, folder=tmp_path, progress=False)


def test_what_an_agent_learned_on(tmp_path):
    """As far as its folder says so, and in the kinds that a command line gives."""
    config = {"algorithm": "td3", "budgets": [LOW, HIGH], "env": "ARQ-X-v0", "sigma": 0.25, "certifier": {"regained_bits": 1}}
    for changes, missing in (
        ({"training": "consistency"}, set()),
        ({}, {"training"}),
        ({"training": None, "sigma": True, "env": 3, "certifier": [1]}, {"training", "sigma", "env", "regained_bits"}),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        found = learned_on(tmp_path)
        assert {"env", "sigma", "training", "regained_bits"} - found.keys() == missing
    assert learned_on(tmp_path) == {}
    for text in ("{}", "[]", "no JSON", json.dumps({"algorithm": ["td3"], "budgets": []})):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ArqError, match="holds no agent for all budgets"):
            learned_on(tmp_path)
