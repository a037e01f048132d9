import fcntl
import json
import shutil
import signal
from collections import Counter
from functools import partial

import numpy as np
import pytest
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from arq_agents.algorithms import ALGORITHMS, WARM_UP_EPISODES, DecayingNoise
from arq_agents.baselines import BASELINES
from arq_agents.haq import CONSTANTS, HaqDdpg
from arq_agents.methods import COMPARED, LEARNERS, SEARCHES, split_method
from arq_agents.recorder import Recorder
from arq_agents.search import CANDIDATES, confirm
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import load_map
from arq_env.finishing import finish_briefly
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


def test_the_reconstruction_says_what_decides_it(tmp_path, monkeypatch):
    """Its constants are in ``config.json``, so that a run made with others is not resumed."""
    search_toy(tmp_path, "arq", 2)
    told = json.loads((tmp_path / "config.json").read_text())["hyperparameters"]
    assert told["actor_rate"] == 1e-4 and told["gradient_steps"] == -1 and told["learning_starts"] == 20 * 4 - 0.5
    for name, value in (("noise", 0.4), ("reward_samples", 64)):
        with monkeypatch.context() as changed:
            changed.setitem(CONSTANTS, name, value)
            with pytest.raises(ArqError, match="differs in hyperparameters"):
                search_toy(tmp_path, "arq", 3)


def test_the_exported_map_is_chosen_on_other_images(tmp_path):
    """Luck on the search's images does not help: the map with the best confirmed ACR is exported, not that of the best reward."""
    env = make_toy_env()
    search_toy(tmp_path, env=env)
    episodes = read_trace(tmp_path / "trace.jsonl")
    best, confirmed = confirm(episodes, env.evaluator, progress=False)
    judge = env.evaluator.second_opinion()
    assert (judge.settings.first, judge.settings.images, judge.settings.n) == (32, 32, 16)
    top = {tuple(e.bit_widths.items()): e for e in sorted(episodes, key=lambda e: e.reward)}.values()
    assert confirmed["confirmed_acr"] == max(judge.evaluate(e.bit_widths).acr for e in list(top)[-CANDIDATES:])
    assert confirmed["confirmed_acr"] == judge.evaluate(best.bit_widths).acr
    assert confirmed["fresh_reward"] == 10 * (confirmed["confirmed_acr"] / confirmed["confirmed_reference_acr"] - 1)
    assert judge.settings.seed != env.evaluator.settings.seed  # other noise, and other images for calibration
    everything = make_toy_env(images=64).evaluator.second_opinion()  # of the reward split nothing is left
    assert (everything.settings.part, everything.settings.images) == ("train", 128)


@pytest.mark.slow
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


def test_tensorboard_needs_no_manual(tmp_path):
    """As it sorts them: sections in the order in which they are read, the reward's curve first; settings and what came out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    best = search_toy(tmp_path, episodes=3)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars, trace = events.Tags()["scalars"], read_trace(tmp_path / "trace.jsonl")
    assert sorted(scalars)[0] == "1_reward/each_episode"
    sections = sorted({tag.split("/")[0] for tag in scalars + events.Tags()["images"]})
    own = ["1_reward", "2_certificate", "3_budget", "4_map", "5_search", "6_exported_map"]
    assert sections[:6] == own and set(sections[6:]) <= {"rollout", "time", "train"}
    (about,) = events.Tensors("about/text_summary")
    assert all(section.encode() in about.tensor_proto.string_val[0] for section in sections)
    assert [event.value for event in events.Scalars("1_reward/each_episode")] == pytest.approx([e.reward for e in trace])
    assert {"5_search/actions_at_bounds", "3_budget/BOPs_fraction", "rollout/ep_rew_mean"} <= set(scalars)
    assert {"4_map/map", "6_exported_map/map", "6_exported_map/pareto"} <= set(events.Tags()["images"])

    told = events.PluginTagToContent("hparams")
    parse = plugin_data_pb2.HParamsPluginData.FromString
    experiment = parse(told[metadata.EXPERIMENT_TAG]).experiment
    settings = {
        key: value.WhichOneof("kind") and getattr(value, value.WhichOneof("kind"))
        for key, value in parse(told[metadata.SESSION_START_INFO_TAG]).session_start_info.hparams.items()
    }
    assert settings["algorithm"] == "td3" and settings["learning_rate"] == 1e-3 and settings["seed"] == 0
    written = json.loads((tmp_path / "bit_widths.json").read_text())["metrics"]
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert "6_exported_map/fresh_reward" in metrics
    for tag in metrics:
        ((step, value),) = [(event.step, event.value) for event in events.Scalars(tag)]
        name = tag.split("/")[1]
        stated = best.bops_fraction if name == "BOPs_fraction" else written[name.lower()]
        assert step == 3 and value == pytest.approx(stated)


@pytest.mark.parametrize("algorithm, episodes", [("td3", 24), pytest.param("random", 12, marks=pytest.mark.slow)])
def test_tensorboard_counts_episodes_and_shows_what_is_there(tmp_path, algorithm, episodes):
    """Read back as TensorBoard does, after a search that was extended; every curve goes on, against episodes."""
    from tensorboard import data_compat
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util import tensor_util

    search_toy(tmp_path, algorithm, episodes - 3)
    best = search_toy(tmp_path, algorithm, episodes)
    (path,) = (tmp_path / "tensorboard").iterdir()
    written = [(event.step, value) for event in LegacyEventFileLoader(str(path)).Load() for value in event.summary.value]
    steps = {}
    for step, value in written:
        steps.setdefault(value.tag, []).append(step)
    every = list(range(1, episodes + 1))
    assert steps.pop("4_map/map") == sorted({1, *range(10, episodes + 1, 10), episodes})
    assert steps.pop("6_exported_map/map") == steps.pop("6_exported_map/pareto") == [best.episode]
    assert steps.pop("about/text_summary") == [0]
    ended = [tag for tag in steps if tag.startswith(("6_exported_map/", "_hparams_/"))]
    assert len(ended) == 5 + 3 and all(steps.pop(tag) in ([0], [episodes]) for tag in ended)
    trained = {tag: s for tag, s in steps.items() if tag.startswith("train/")}
    assert all(s == every[-len(s) :] for s in trained.values()) and bool(trained) == (algorithm == "td3")
    assert all(s == every for tag, s in steps.items() if tag not in trained)
    trace = read_trace(tmp_path / "trace.jsonl")
    for name, kind in (("4_map/weight_bits", 0), ("4_map/activation_bits", 1)):
        for step, value in written:
            if value.tag == name:
                counts = Counter(bits[kind] for layer, bits in trace[step - 1].bit_widths.items() if layer in ("middle", "deep"))
                buckets = tensor_util.make_ndarray(data_compat.migrate_value(value).tensor)
                assert (buckets[:, 1] - buckets[:, 0] == 1).all()  # as high as there are layers
                assert {int(left + 0.5): count for left, _, count in buckets if count} == counts


FILES = {"tensorboard is a file": "tensorboard", "trace is a folder": "trace.jsonl", "card is a folder": "bit_widths.json"}


@pytest.mark.parametrize("algorithm", [pytest.param("td3", marks=pytest.mark.slow), "random"])
@pytest.mark.parametrize("name", FILES.values(), ids=FILES)
def test_files_that_cannot_be_written_are_one_line(tmp_path, algorithm, name):
    search_toy(tmp_path, algorithm, 2)
    path = tmp_path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if name == "tensorboard" else path.mkdir()
    for _ in range(2):  # the first leaves no lock behind
        with pytest.raises(ArqError, match=f"{name} .*(File exists|Is a directory)") as raised:
            search_toy(tmp_path, algorithm, 3)
        assert "\n" not in str(raised.value)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(outcome(tmp_path)) in (0, 2, 3) and search_toy(tmp_path, algorithm, 3)


@pytest.mark.parametrize(
    "algorithm, size",
    [
        pytest.param("td3", 100, marks=pytest.mark.slow),
        ("td3", 20_000),
        ("random", 2_000),
        pytest.param("random", 5_000, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_loses_no_episode(tmp_path, algorithm, size, capfd):
    """No file may grow beyond some bytes: TensorBoard's, or the trace. Then there is room again."""
    search_toy(tmp_path / "whole", algorithm, 5)
    resource = pytest.importorskip("resource")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        search_toy(tmp_path / "cut", algorithm, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        for _ in range(2):
            with pytest.raises(ArqError, match="cannot write"):
                search_toy(tmp_path / "cut", algorithm, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "Traceback" not in capfd.readouterr().err
    found = outcome(tmp_path / "cut")
    assert found == outcome(tmp_path / "whole")[: len(found)]
    search_toy(tmp_path / "cut", algorithm, 5)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_an_error_while_searching_is_told_and_not_the_one_of_closing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    env = make_toy_env()
    env.evaluator.evaluate = lambda bit_widths: 1 / 0
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.close", fail)
    with pytest.raises(ZeroDivisionError):
        search_toy(tmp_path, "random", 3, env=env)
    with pytest.raises(ArqError, match="No space left"):
        search_toy(tmp_path, "random", 3)
    monkeypatch.undo()
    assert search_toy(tmp_path, "random", 3)


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
    quantize = evaluator.quantizer.quantize
    evaluator.quantizer.quantize = lambda bits, **how: quantized.append(bits) or quantize(bits, **how)
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
    warm_up = np.array(actions[: 2 * WARM_UP_EPISODES])
    assert (np.abs(warm_up) > 0.99).mean() < 0.06 and 0.4 < warm_up.std() < 0.75


@pytest.mark.parametrize("algorithm", ["td3", "sac", "arq"])
def test_the_policy_acts_from_the_end_of_the_last_random_episode_on(tmp_path, algorithm, monkeypatch):
    """And the first gradient step is made then."""
    asked, first_trained = [], []
    act = OffPolicyAlgorithm.predict
    monkeypatch.setattr(OffPolicyAlgorithm, "predict", lambda self, *a, **k: asked.append(self.num_timesteps) or act(self, *a, **k))
    for kind in (*ALGORITHMS.values(), HaqDdpg):
        train = kind.train
        monkeypatch.setattr(
            kind, "train", lambda self, *a, train=train, **k: first_trained.append(self.num_timesteps) or train(self, *a, **k)
        )
    search_toy(tmp_path, algorithm, WARM_UP_EPISODES + 1)
    steps = WARM_UP_EPISODES * (4 if algorithm == "arq" else 2)
    assert asked[0] == first_trained[0] == steps


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


def test_the_names_of_the_searches_are_those_there_are():
    assert tuple(ALGORITHMS) == LEARNERS and tuple(BASELINES) == SEARCHES
    for method in COMPARED:
        split_method(method)
