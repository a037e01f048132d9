import fcntl
import json
from functools import partial

import numpy as np
import pytest

from agents.algorithms import WARM_UP_EPISODES, DecayingNoise
from agents.recorder import Recorder
from agents.search import CANDIDATES, confirm
from agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import load_map
from arq_env.finetuning import finish_briefly
from tests.toy import EPISODES, make_toy_env, outcome, search_toy


@pytest.mark.parametrize("algorithm", ["td3", "ddpg", "sac"])
def test_run_folder(tmp_path, algorithm):
    env = make_toy_env()
    best = search_toy(tmp_path, algorithm, env=env)
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "trace.jsonl",
        "tensorboard",
        "agent.zip",
        "bit_widths.json",
    }
    episodes = read_trace(tmp_path / "trace.jsonl")
    assert len(episodes) == EPISODES
    rewards = {tuple(e.bit_widths.items()): e.reward for e in episodes}  # a map met again is one candidate
    assert best.reward in sorted(rewards.values())[-CANDIDATES:]
    bit_widths, document = load_map(tmp_path / "bit_widths.json", env.layers)
    assert bit_widths == best.bit_widths and document["metrics"]["reward"] == best.reward
    assert document["metrics"]["confirmed_acr"] > 0 and document["metrics"]["confirmed_images"] == 32
    assert document["provenance"]["versions"]["torch"]
    assert json.loads((tmp_path / "config.json").read_text())["hyperparameters"]["gamma"] == 1.0
    assert len({e.reward for e in episodes}) > 3 and all(e.bops_fraction <= 0.03 for e in episodes)


def test_the_exported_map_is_chosen_on_other_images(tmp_path):
    """Luck on the search's images does not help: the map with the best confirmed ACR is exported, not that of the best reward."""
    env = make_toy_env()
    search_toy(tmp_path, env=env)
    episodes = read_trace(tmp_path / "trace.jsonl")
    best, confirmed = confirm(episodes, env.evaluator, progress=False)
    judge = env.evaluator.second_opinion()
    assert (judge.settings.first, judge.settings.images, judge.settings.n) == (32, 32, 32)
    top = {tuple(e.bit_widths.items()): e for e in sorted(episodes, key=lambda e: e.reward)}.values()
    assert confirmed["confirmed_acr"] == max(judge.evaluate(e.bit_widths).acr for e in list(top)[-CANDIDATES:])
    assert confirmed["confirmed_acr"] == judge.evaluate(best.bit_widths).acr
    everything = make_toy_env(images=64)  # nothing is left for a second opinion
    assert everything.evaluator.second_opinion() is None
    assert confirm(episodes, everything.evaluator, progress=False)[0].reward == max(e.reward for e in episodes)


def test_where_fine_tuning_is_foretold_the_best_maps_are_fine_tuned(tmp_path):
    env = make_toy_env(regained_bits=1)
    search_toy(tmp_path, "random", episodes=7, env=env, confirming_steps=2)
    episodes = read_trace(tmp_path / "trace.jsonl")
    best, confirmed = confirm(episodes, env.evaluator, 20, progress=False)
    judge = env.evaluator.second_opinion()
    finished = [judge.measure(partial(finish_briefly, env.evaluator, e.bit_widths, 20)).acr for e in episodes]
    top = np.argsort([-e.reward for e in episodes], kind="stable")[:CANDIDATES]
    assert confirmed["confirmed_acr"] == max(finished[i] for i in top) == finished[best.episode - 1]
    assert confirmed["confirmed_steps"] == 20 and finished[best.episode - 1] != judge.evaluate(best.bit_widths).acr
    as_judged, confirmed = confirm(episodes, env.evaluator, 0, progress=False)
    assert confirmed["confirmed_steps"] == 0 and confirmed["confirmed_acr"] == judge.evaluate(as_judged.bit_widths).acr


def test_tensorboard_has_what_the_readme_promises(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    search_toy(tmp_path, episodes=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    names = {"reward", "acr", "certified_accuracy", "bops_fraction", "actions_at_bounds", "best_reward"}
    assert {f"arq/{name}" for name in names} | {"rollout/ep_rew_mean"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("arq/reward")] == pytest.approx(
        [e.reward for e in read_trace(tmp_path / "trace.jsonl")]
    )
    assert "arq/map" in events.Tags()["images"] and "arq/bits" in events.Tags()["histograms"]


def test_a_killed_search_resumes_to_the_same_end(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = search_toy(whole)

    class Killed(Exception):
        pass

    env, done = make_toy_env(), []
    evaluate = env.evaluator.evaluate

    def dying(bit_widths):
        done.append(bit_widths)
        if len(done) == WARM_UP_EPISODES + 3:
            raise Killed
        return evaluate(bit_widths)

    env.evaluator.evaluate = dying
    with pytest.raises(Killed):
        search_toy(cut, env=env)
    with open(cut / "trace.jsonl", "a") as file:
        file.write('{"episode": 23, "rew')  # a line that the kill cut short

    env = make_toy_env()
    quantized = []
    evaluator = env.evaluator
    evaluator.quantizer.quantize = lambda bits, original=evaluator.quantizer.quantize: quantized.append(bits) or original(bits)
    best = search_toy(cut, env=env)
    assert outcome(cut) == outcome(whole)
    assert (best.episode, best.reward) == (expected.episode, expected.reward)
    assert len(quantized) <= 4 + CANDIDATES  # the other maps of the search were recalled


def test_more_episodes_extend_a_search(tmp_path):
    search_toy(tmp_path / "a", episodes=WARM_UP_EPISODES + 2)
    search_toy(tmp_path / "a")
    search_toy(tmp_path / "b")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")
    with pytest.raises(ArqError, match=f"already has {EPISODES} episodes"):
        search_toy(tmp_path / "a", episodes=3)


def test_two_processes_never_write_one_trace(tmp_path):
    search_toy(tmp_path, episodes=2)
    with open(tmp_path / "trace.jsonl", "a") as file:
        file.write('{"episode": 3')  # which the other process is about to finish
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with open(tmp_path / "config.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ArqError, match="another process"):
            search_toy(tmp_path, episodes=3)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    search_toy(tmp_path, episodes=3)


def test_a_process_that_read_the_trace_too_early_does_not_add_to_it(tmp_path):
    search_toy(tmp_path, episodes=2)
    known = read_trace(tmp_path / "trace.jsonl")
    search_toy(tmp_path, episodes=3)
    for _ in range(2):  # the first leaves no lock behind
        with pytest.raises(ArqError, match="another process has just written"):
            Recorder(tmp_path, make_toy_env().layers, 4, known, progress=False)
    assert len(read_trace(tmp_path / "trace.jsonl")) == 3


def test_a_finished_search_is_left_as_it_is(tmp_path):
    """Also a map that was edited by hand afterwards."""
    best = search_toy(tmp_path, episodes=3)
    edited = (tmp_path / "bit_widths.json").read_text().replace('"weight_bits": 2', '"weight_bits": 3')
    (tmp_path / "bit_widths.json").write_text(edited)
    env = make_toy_env()
    env.evaluator.evaluate = lambda bit_widths: pytest.fail("evaluated again")
    assert search_toy(tmp_path, episodes=3, env=env) == best
    assert (tmp_path / "bit_widths.json").read_text() == edited
    (tmp_path / "bit_widths.json").unlink()  # killed before the end
    assert search_toy(tmp_path, episodes=3).same_outcome(best) and (tmp_path / "bit_widths.json").exists()


def test_another_search_is_never_overwritten(tmp_path):
    search_toy(tmp_path, episodes=2)
    before = (tmp_path / "trace.jsonl").read_bytes()
    for change, name in [
        ({"seed": 1}, "seed"),
        ({"algorithm": "sac"}, "algorithm"),
        ({"env": make_toy_env(budget=0.04)}, "budget"),
    ]:
        with pytest.raises(ArqError, match=name):
            search_toy(tmp_path, **{"episodes": 2} | change)
    assert (tmp_path / "trace.jsonl").read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ArqError, match="not empty"):
        search_toy(tmp_path / "other")


def test_a_damaged_trace_is_an_error(tmp_path):
    search_toy(tmp_path, episodes=2)
    (tmp_path / "trace.jsonl").write_text("nonsense\n")
    with pytest.raises(ArqError, match="line 1"):
        search_toy(tmp_path, episodes=2)


@pytest.mark.parametrize("key, value", [("reward", 0.125), ("reference_acr", 0.125), ("episode", 7)])
def test_a_trace_that_does_not_replay_is_an_error(tmp_path, key, value):
    search_toy(tmp_path, episodes=2)
    path = tmp_path / "trace.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(json.dumps(json.loads(first) | {key: value}) + "\n" + second + "\n")
    with pytest.raises(ArqError, match="did not come out"):
        search_toy(tmp_path, episodes=3)


def test_warm_up_is_uniform_and_noise_follows(tmp_path):
    """Actions as SB3 really plays them: far from the bounds in the warm-up, none of them noisy twice."""
    env, actions = make_toy_env(), []
    step = env.step
    env.step = lambda action: actions.append(action) or step(action)
    search_toy(tmp_path, env=env)
    warm_up = np.array(actions[: 2 * WARM_UP_EPISODES - 1])
    assert (np.abs(warm_up) > 0.99).mean() < 0.06 and 0.4 < warm_up.std() < 0.75


def test_zero_episodes(tmp_path):
    with pytest.raises(ArqError, match="at least 1"):
        search_toy(tmp_path, episodes=0)
    with pytest.raises(ArqError, match="td3"):
        search_toy(tmp_path / "x", algorithm="ppo")


def test_noise_decays_after_the_warm_up():
    np.random.seed(0)
    noise = DecayingNoise(1_000, std=0.5, decay=0.9, least=0.1)
    noise.reset()  # as SB3 does before the first episode
    spread = []
    for _ in range(WARM_UP_EPISODES + 40):
        spread.append(noise().std())
        noise.reset()
    assert not any(spread[:WARM_UP_EPISODES])
    assert spread[WARM_UP_EPISODES] == pytest.approx(0.5, rel=0.1)
    assert spread[WARM_UP_EPISODES + 5] == pytest.approx(0.5 * 0.9**5, rel=0.15)
    assert spread[-1] == pytest.approx(0.1, rel=0.1)
