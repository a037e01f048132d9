"""Searches that share their evaluations, and the curves drawn from their traces."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from arq_agents.equal_cost import (
    best_so_far,
    difference_of_means,
    half_width,
    reaches,
    recall,
    run_search,
    setup_cost,
    share_sensitivities,
)
from arq_agents.finishing import finished_radii
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import restrict, uniform
from arq_env.comparison import TestSettings
from arq_env.datasets import Split
from arq_env.env import ArqEnv
from arq_env.evaluation import Evaluator
from tests.toy import make_toy_env, toy_dataset, toy_problem


def run(store, method, seed=0, env=None, episodes=8):
    folder = store / "runs" / f"{method}-{seed}"
    run_search(method, env or make_toy_env(), seed=seed, episodes=episodes, folder=folder, store=store, config={})
    return read_trace(folder / "trace.jsonl")


def count_evaluations(env):
    made, original = [], env.evaluator.measure
    env.evaluator.measure = lambda build: made.append(build) or original(build)
    return made


def test_what_one_searchmeasured_is_free_for_the_next(tmp_path):
    first = run(tmp_path, "random")
    env = make_toy_env()
    made = count_evaluations(env)
    run_search("random", env, seed=0, episodes=8, folder=tmp_path / "runs" / "again", store=tmp_path, config={})
    assert not made
    again = read_trace(tmp_path / "runs" / "again" / "trace.jsonl")
    assert [(e.reward, e.evaluations) for e in again] == [(e.reward, e.evaluations) for e in first]


@pytest.mark.parametrize("change", [{"images": 31}, {"seed": 1}, {"n": 17}])
def test_evaluations_made_otherwise_are_not_shared(tmp_path, change):
    run(tmp_path, "uniform")
    other = make_toy_env(**change).evaluator
    recall(other, tmp_path)
    assert not other._known


def test_evaluations_on_other_data_or_of_another_reward_are_not_shared(tmp_path):
    """As those of traces from before the reward had a number, which is the published ones'."""
    run(tmp_path, "uniform")
    data = toy_dataset()
    other = replace(data, reward=Split(data.reward.images, np.roll(data.reward.labels, 1)))
    elsewhere = Evaluator(toy_problem(load=lambda: other), make_toy_env().evaluator.settings)
    recall(elsewhere, tmp_path)
    assert not elsewhere._known
    with pytest.raises(ArqError, match="differs in data.: choose another --output"):  # nor is a finished run handed back
        run(tmp_path, "uniform", env=ArqEnv(elsewhere.problem, budget=0.03, settings=elsewhere.settings))
    path = tmp_path / "runs/uniform-0/config.json"
    config = json.loads(path.read_text())
    del config["reward_version"]
    path.write_text(json.dumps(config))
    here = make_toy_env().evaluator
    recall(here, tmp_path)
    assert not here._known
    with pytest.raises(ArqError, match="differs in reward_version.: choose another --output"):
        run(tmp_path, "uniform")


def test_a_damaged_neighbour_is_named(tmp_path):
    run(tmp_path, "uniform")
    (tmp_path / "runs" / "uniform-0" / "config.json").write_text("[]")
    with pytest.raises(ArqError, match="uniform-0/config.json cannot be read"):
        recall(make_toy_env().evaluator, tmp_path)


def test_sensitivities_are_shared(tmp_path, monkeypatch):
    trace = run(tmp_path, "integer_program", episodes=20)
    (path,) = tmp_path.glob("sensitivities-*.json")
    rows = json.loads(path.read_text())
    monkeypatch.setattr("arq_env.evaluation.estimate_sensitivities", lambda *_: pytest.fail("measured again"))
    evaluator = make_toy_env().evaluator
    share_sensitivities(evaluator, tmp_path)
    assert [evaluator.sensitivities[row["layer"], row["kind"]] for row in rows] == [row["divergence"] for row in rows]
    assert isinstance(evaluator, Evaluator) and len(run(tmp_path, "greedy", episodes=20)) == 1 and trace
    with pytest.raises(ArqError, match="give at least 1"):
        run(tmp_path, "greedy", seed=1, episodes=5)


def test_the_cost_before_the_first_map():
    env = make_toy_env()
    assert setup_cost("random", env) == setup_cost("td3", env) == 0
    # nine passes of 512 images, against 320 + 32 x 16
    evaluation = 320 + 32 * 16
    assert setup_cost("greedy", env) == pytest.approx(9 * 512 / evaluation)
    assert setup_cost("arq", env) == pytest.approx(4 * (100 + 16 * 128) / evaluation)
    both = setup_cost("greedy", env) + setup_cost("arq", env)
    assert setup_cost("sac+incremental", env) == setup_cost("arq", env) and setup_cost("td3+features+incremental", env) == both


def test_curves(tmp_path):
    trace = run(tmp_path, "random")
    rewards = [episode.reward for episode in trace]
    curve = best_so_far(trace, 10)
    assert curve[0] == rewards[0] and curve[7] == curve[9] == max(rewards) and (np.diff(curve) >= 0).all()
    late = best_so_far(trace, 10, setup=2.5)
    assert np.isnan(late[:3]).all() and (late[3:] == curve[:7]).all()
    assert reaches(late, rewards[0]) == 4 and reaches(curve, max(rewards) + 1) is None


def test_finished_maps_are_kept(tmp_path, monkeypatch):
    """FP32 after the same fine-tuning is at least level with 2 bits; what is done is not done again, other steps are."""
    evaluator, settings = make_toy_env().evaluator, TestSettings(every=1, n0=8, n=50)
    maps = {"FP32": None, "coarse": uniform(restrict(evaluator.problem.layers, {}), 2, 2)}
    first = {name: finished_radii(evaluator, m, tmp_path, steps=4, settings=settings) for name, m in maps.items()}
    assert first["FP32"].shape == (40,) and first["FP32"].mean() > first["coarse"].mean() > 0
    monkeypatch.setattr("arq_agents.finishing.finish_briefly", lambda *_: pytest.fail("finished again"))
    assert (finished_radii(evaluator, maps["coarse"], tmp_path, steps=4, settings=settings) == first["coarse"]).all()
    with pytest.raises(pytest.fail.Exception, match="finished again"):
        finished_radii(evaluator, maps["coarse"], tmp_path, steps=5, settings=settings)


def test_intervals_are_student_s_and_welch_s():
    a, b = [-0.40, -0.43, -0.39, -0.41, -0.42], [-0.44, -0.50, -0.47]
    low, high = stats.t.interval(0.95, 4, np.mean(a), stats.sem(a))
    assert half_width(a) == pytest.approx((high - low) / 2) and half_width([1.0]) is None
    one = difference_of_means(a, b, 1)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (one["mean"] - one["half_width"], one["mean"] + one["half_width"]) == pytest.approx((low, high))
    assert difference_of_means(a, b, 10)["half_width"] > one["half_width"]  # ten at once
    low, high = stats.ttest_1samp(a, -0.5).confidence_interval(0.95)
    single = difference_of_means(a, [-0.5], 1)
    assert single["mean"] + single["half_width"] == pytest.approx(high + 0.5)
    assert difference_of_means([1.0], [2.0], 3) == {"mean": -1.0, "half_width": None}


def test_intervals_hold_all_at_once():
    """Of twenty differences between searches that are alike, with five runs each: in about 95 of 100 comparisons all hold zero."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        ours, *others = rng.normal(size=(21, 5))
        found = [difference_of_means(ours, other, 20) for other in others]
        held += all(abs(d["mean"]) <= d["half_width"] for d in found)
    assert held / 400 > 0.94
