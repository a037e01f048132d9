"""Every kind of budget behind one interface, through the environment and every search."""

import contextlib
import hashlib
import json

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arq_agents import command_line, shared_options
from arq_agents.any_budget import DrawnBudget, train_for_any_budget
from arq_agents.baselines import greedy, integer_program, least_sensitive, uniform_bits
from arq_agents.haq import cut_to_budget
from arq_agents.levers import exchange
from arq_agents.trace import read_trace
from arq_env import ArqError
from arq_env.bitwidths import Bits, check_map, complete, fixed_layers, free_layers, load_map, save_map, uniform
from arq_env.budget import BUDGETS, AllOf, BytesBudget, LatencyBudget, make_budget
from arq_env.env import ArqEnv
from arq_env.problem import load_mapped
from arq_env.quantization import model_bytes
from arq_env.sensitivity import places
from tests.test_layers_and_budget import LAYERS, TIED, Projected
from tests.toy import make_toy_env, search_toy, toy_problem


def tied_env(budget, **changes) -> ArqEnv:
    """On two residual blocks with projection shortcuts, whose rewards nobody asks for."""
    return ArqEnv(toy_problem(network=Projected().eval(), **changes), budget=budget)


#: What is fixed at what, and which bit-widths there are.
CHOICES = {
    "ends": {},
    "nothing": {"fix": {}, "bits": (2, 4, 8)},
    "the middle": {"fix": {"conv2": "4/3", "fc": "8/8"}, "bits": (3, 4, 8)},
    "both of a tie": {"fix": {"first": "5/5", "*1": "2/5"}, "bits": (5, 2)},
}


def write_table(path, layers, pairs=((4, 4), (4, 8), (8, 8))):
    """Latencies that grow with MACs and bits, for the kernels of a made-up device."""
    rows = {layer.name: {f"{w}/{a}": layer.macs * (w + a) / 1e6 for w, a in pairs} for layer in layers}
    path.write_text(json.dumps({"layers": rows, "beside": 0.125}))
    return path


def kinds(tmp_path, layers, problem) -> dict:
    """A tight budget of each kind, and of several at once."""
    table = write_table(tmp_path / "times.json", layers)
    four = uniform(layers, 4, 4)
    milliseconds = LatencyBudget(layers, 1e6, table=table).amount(four) * 1.1
    size = int(model_bytes(problem.network, layers, four) * 1.01)
    latency = {"milliseconds": milliseconds, "table": str(table)}
    bops = make_budget(1.0, problem).amount(four) * 1.05
    one = {"bops": bops, "bytes": size, "latency": latency}
    return {**{name: {name: value} for name, value in one.items()}, "all": one}


@pytest.mark.parametrize("kind", [*BUDGETS, "all"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_map_is_within_any_budget(tmp_path, kind, choice):
    """Of random episodes, plans, the integer program, greedy, uniform bits, exchanges and HAQ; on tied layers, too.

    And it has no other bits than there are, and those that are fixed.
    """
    problem = toy_problem(network=Projected().eval(), **CHOICES[choice])
    env = tied_env(kinds(tmp_path, problem.layers, problem)[kind], **CHOICES[choice])
    env.judge = lambda bit_widths: {"reward": 0.0, "map": bit_widths}
    rng, budget = np.random.default_rng(0), env.default_budget
    env.evaluator.remember_sensitivities(
        {place: [*np.sort(rng.random(6) + 0.01)[::-1].tolist(), 0.0] for place in places(env.layers)}
    )
    maps = []
    for _ in range(40):
        observation, _ = env.reset()
        actions = rng.uniform(-1, 1, (env.horizon, 2)).astype(np.float32)
        for action in actions:
            assert observation in env.observation_space
            observation, _, _, _, info = env.step(action)
        maps.append(info["map"])
        assert env.decode(actions) == info["map"]
        env.reset()
        assert env.decode(env.encode(info["map"])) == info["map"]
        maps.append(cut_to_budget({layer.name: Bits(*map(int, rng.choice(env.widths, 2))) for layer in env.free_layers}, env))
    best = least_sensitive(env, env.sensitivities)
    maps += [*greedy(env), *integer_program(env), *uniform_bits(env)]
    proposals = exchange(env, {tuple(best.items()): 0.0})
    with contextlib.suppress(StopIteration):  # few bits leave few neighbours
        maps.append(next(proposals))
        for _ in range(5):
            maps.append(proposals.send(-1.0))
    fixed = fixed_layers(env.layers)
    for bit_widths in maps:
        check_map(bit_widths, env.layers)
        assert {bits for pair in bit_widths.values() for bits in pair} <= {*env.widths}
        assert all(bit_widths[name].weight == bits.weight for name, bits in fixed.items())
        assert all(bit_widths[name].activation == fixed[name].activation for name in fixed if choice != "ends")
        assert all(part.cost(bit_widths) <= part.limit for part in budget.parts)
    assert len({str(bit_widths) for bit_widths in maps}) > (20 if len(env.widths) > 3 else 5)
    # the integer program's is the best of all these
    effects = env.sensitivities

    def lost(bit_widths):
        return sum(effect[getattr(bit_widths[name], place) - 2] for (name, place), effect in effects.items())

    assert all(lost(best) <= lost(bit_widths) + 1e-9 for bit_widths in maps)


def test_bytes_are_those_of_the_packed_model():
    """Whatever the map, on a network with BatchNorm, biases and a tied layer; activation bits cost nothing."""
    rng = np.random.default_rng(0)
    for problem in (toy_problem(), toy_problem(network=Projected().eval())):
        budget = make_budget({"bytes": 10**6}, problem)
        for _ in range(20):
            chosen = {layer.name: Bits(*map(int, rng.integers(2, 9, 2))) for layer in free_layers(problem.layers)}
            bit_widths = complete(chosen, problem.layers)
            assert budget.cost(bit_widths) == budget.amount(bit_widths) == model_bytes(problem.network, problem.layers, bit_widths)
        assert budget.priced == ("weight",) and budget.level(3) == (3, 8)


def test_an_even_share_of_bytes():
    """Of weight bits; activations have 8, less what the action takes off."""
    layers = toy_problem().layers
    size = make_budget({"bytes": 10**6}, toy_problem()).amount(uniform(layers, 4, 8))
    env = make_toy_env(budget={"bytes": size})
    assert env.default_budget.even_bits({}) == (4.0, 8.0)
    assert env.reset()[0][11] == np.float32(np.sqrt(4 * 8) / 8)
    assert env.decode([[0, 0], [0, 0]]) == uniform(layers, 4, 8)
    assert env.decode([[0, -1], [0, 1]])["middle"] == (4, 7)
    lean = env.decode([[-1, 0], [1, 0]])
    assert lean["middle"] == (3, 8) and lean["deep"].weight > 4
    middle, half = (make_budget({"bytes": size + more}, toy_problem()) for more in (0, 40))
    weights = sum(layer.parameters for layer in env.free_layers)
    assert middle.even_bits({})[0] == 4 and half.even_bits({})[0] == pytest.approx(4 + 8 * 40 / weights)
    info = env.judge(uniform(layers, 4, 8))
    assert info["bytes"] == size and 0 < info["bops_fraction"] < 1


def test_bits_that_save_nothing_stay():
    """Bytes are short and bit operations are not: activations are left alone."""
    budget = make_budget({"bytes": 10**6}, toy_problem())
    tight = budget.at(budget.amount(uniform(toy_problem().layers, 3, 8)))
    assert tight.fit(Bits(3, 8), {}) == (3, 8)
    both = AllOf([make_budget(1.0, toy_problem()), tight])
    weight, activation = both.fit(Bits(8, 8), {})
    assert weight < 8 == activation and both.fit(Bits(8, 5), {}) == (weight, 5)


@settings(deadline=None)
@given(st.integers(65_000, 300_000), st.lists(st.tuples(st.integers(-3, 12), st.integers(-3, 12)), min_size=18, max_size=18))
def test_whatever_is_asked_for_fits_in_bytes(size, wishes):
    budget = BytesBudget(LAYERS, max(size, BytesBudget(LAYERS, 1e9).least({})))
    chosen = {}
    for layer, wish in zip(budget.free, wishes, strict=True):
        chosen[layer.name] = budget.fit(Bits(*wish), chosen)
        assert chosen[layer.name].activation == min(max(wish[1], 2), 8)
    assert budget.within(complete(chosen, LAYERS))


def test_fewer_bits_run_in_wider_kernels(tmp_path):
    layers = TIED
    budget = LatencyBudget(layers, 1.0, table=write_table(tmp_path / "times.json", layers))
    name, macs = layers[1].name, layers[1].macs
    milliseconds = {pair: budget.costs[name][pair[0] - 2, pair[1] - 2] / 1e6 for pair in ((2, 2), (3, 5), (5, 3), (8, 8))}
    expected = {(2, 2): 8, (3, 5): 12, (5, 3): 16, (8, 8): 16}
    assert milliseconds == pytest.approx({pair: macs * sum_ / 1e6 for pair, sum_ in expected.items()})
    assert all((np.diff(costs, axis=axis) >= 0).all() for costs in budget.costs.values() for axis in (0, 1))
    everywhere = sum(layer.macs for layer in layers) * 16 / 1e6 + 0.125
    assert budget.amount(uniform(layers, 8, 8)) == pytest.approx(everywhere)
    exact = budget.at(everywhere)
    assert exact.even_bits({}) == (8, 8) and exact.within(uniform(layers, 5, 5)) and str(exact).endswith(" ms")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: d["layers"].pop("conv2"), "has no row for layer, 'conv2'"),
        (lambda d: d["layers"].update(conv9={"8/8": 1}), "does not have, 'conv9'"),
        (lambda d: d["layers"]["conv1"].pop("8/8"), "lacks '8/8' for layer 'conv1'"),
        (lambda d: d["layers"]["conv1"].update({"1/8": 1}), "has '1/8' for layer 'conv1'"),
        (lambda d: d["layers"]["conv1"].update({"8/8": -1}), "time -1 for 'conv1', 8/8"),
        (lambda d: d["layers"]["conv1"].update({"8/8": "fast"}), "time 'fast'"),
        (lambda d: d.update(beside=None), "beside"),
        (lambda d: d.update(layers=[1]), "cannot be read as a table"),
        (lambda d: d.pop("layers"), "needs layers"),
    ],
)
def test_tables_of_latencies_that_are_none(tmp_path, damage, message):
    path = write_table(tmp_path / "times.json", TIED)
    document = json.loads(path.read_text())
    damage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ArqError, match=message):
        LatencyBudget(TIED, 1.0, table=path)


def test_a_table_that_has_changed(tmp_path):
    path = write_table(tmp_path / "times.json", TIED)
    env = tied_env({"latency": {"milliseconds": 1.0, "table": str(path)}})
    assert json.loads(json.dumps(env.default_budget.spec)) == env.default_budget.spec
    assert tied_env(env.default_budget.spec).default_budget.spec == env.default_budget.spec
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ArqError, match="another table"):
        tied_env(env.default_budget.spec)


@pytest.mark.parametrize(
    "budget, message",
    [
        ({}, "one or several of bops, bytes, latency"),
        ({"grams": 5}, "one or several of bops, bytes, latency"),
        ({3: 5}, "one or several"),
        ({"bops": 2}, "fraction"),
        ({"bytes": -1}, "positive number of bytes"),
        ({"bytes": True}, "positive number of bytes"),
        ({"bytes": "many"}, "positive number of bytes"),
        ({"bytes": float("nan")}, "positive number of bytes"),
        ({"bytes": 10**400}, "positive number of bytes"),
        ({"bytes": 100}, "a budget of 100 bytes cannot be met: the least reachable is"),
        ({"bops": 0.05, "bytes": 100}, "least reachable is"),
        ({"latency": 3.0}, "give {'milliseconds'"),
        ({"latency": {"milliseconds": 3.0, "table": 5}}, "path of a JSON file"),
        ({"latency": {"milliseconds": 3.0, "table": "nowhere.json"}}, "nowhere.json cannot be read"),
    ],
)
def test_budgets_that_are_none(budget, message):
    with pytest.raises(ArqError, match=message):
        make_toy_env(budget=budget)


def test_the_least_reachable_of_each_kind_is_met(tmp_path):
    for name, value in (("bytes", 1), ("bops", 1e-6), ("latency", 1e-6)):
        given = {"milliseconds": value, "table": str(write_table(tmp_path / "t.json", TIED))} if name == "latency" else value
        with pytest.raises(ArqError, match="least reachable is") as error:
            tied_env({name: given})
        least = float(str(error.value).split("least reachable is ")[1].split()[0])
        given = given | {"milliseconds": least} if name == "latency" else least
        assert tied_env({name: given}).default_budget.least({}) > 0


def test_a_budget_for_one_episode_is_of_the_environment_s_kind(tmp_path):
    env = make_toy_env(budget={"bytes": 900, "bops": 0.03})
    env.reset(options={"budget": {"bytes": 800, "bops": 0.05}})
    assert env.budget.value == {"bops": 0.05, "bytes": 800} and str(env.budget).startswith("800 bytes and 5.000%")
    assert env.default_budget.spec == {"bytes": 900, "bops": 0.03}
    for wrong in (0.02, {"bytes": 800}, {"bytes": 800, "bops": 0.02, "grams": 1}):
        with pytest.raises(ArqError, match="a limit for each of bytes, bops"):
            env.reset(options={"budget": wrong})
    single = make_toy_env(budget={"bytes": 900})
    single.reset(options={"budget": 800})
    assert single.budget.value == 800
    with pytest.raises(ArqError, match="positive number of bytes"):
        single.reset(options={"budget": {"bytes": 800}})


def test_a_specification_can_be_written():
    env = gymnasium.make("ARQ-ResNet20-v0", budget={"bytes": 150_000, "bops": 0.02})
    spec = gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())
    assert gymnasium.make(spec).unwrapped.default_budget.spec == {"bytes": 150_000, "bops": 0.02}
    assert env.reset()[0] in env.observation_space


def test_limits_that_no_map_reaches():
    for budget in ({"bytes": 1e300}, {"bytes": 10**300}, {"bops": 1.0, "bytes": 2**60}):
        env = make_toy_env(budget=budget)
        assert env.decode([[0, 0], [1, 1]]) == uniform(env.layers, 8, 8) == next(integer_program(env)) == next(greedy(env))


def test_a_budget_on_a_command_line(capsys):
    parser = command_line.parser("Anything.")
    shared_options.add_environment(parser, budget=0.01)
    for words, budget, name in (
        ([], 0.01, "0.01"),
        (["0.007"], 0.007, "0.007"),
        (["bops=0.007"], 0.007, "0.007"),
        (["bytes=120000"], {"bytes": 120_000}, "bytes120000"),
        (["bytes=1234567", "bops=0.02"], {"bytes": 1_234_567, "bops": 0.02}, "bops0.02-bytes1234567"),
        (["latency=3.5:t=1.json"], {"latency": {"milliseconds": 3.5, "table": "t=1.json"}}, "latency3.5"),
    ):
        found = parser.parse_args(["--budget", *words] if words else []).budget
        assert found == budget and shared_options.budget_name(found) == name
    for words, message in ((["much"], "--budget: invalid limit value: 'much'"), (["0.1", "bops=0.2"], "two limits of one kind")):
        with pytest.raises(SystemExit):
            parser.parse_args(["--budget", *words])
        assert message in capsys.readouterr().err


def test_a_map_s_file_over_its_budget(tmp_path):
    """Edited by hand: it is used, and said to be over; a budget that is none is refused."""
    header = {"network": "resnet20", "dataset": "cifar10", "sigma": 0.5}
    path, bit_widths = tmp_path / "map.json", uniform(LAYERS, 4, 4)
    save_map(path, bit_widths, LAYERS, **header, budget={"bytes": 200_000, "bops": 0.02})
    assert load_mapped(path)[1] == bit_widths
    save_map(path, bit_widths, LAYERS, **header, budget={"bytes": 100_000, "bops": 0.02})
    with pytest.warns(UserWarning, match="costs more than its budget of 100000 bytes and 2.000% of FP32's bit operations"):
        load_mapped(path)
    save_map(path, bit_widths, LAYERS, **header, budget={"grams": 1})
    with pytest.raises(ArqError, match="one or several of bops, bytes, latency"):
        load_mapped(path)


def test_a_search_in_bytes(tmp_path, monkeypatch):
    """Its folder says so, and another limit is another search."""
    monkeypatch.setattr("arq_agents.search.EXCHANGES", 2)
    for algorithm in ("td3+demonstrations", "random+exchange"):
        env, folder = make_toy_env(budget={"bytes": 900}), tmp_path / algorithm
        search_toy(folder, algorithm, 4, env=env)
        assert json.loads((folder / "config.json").read_text())["budget"] == {"bytes": 900}
        bit_widths, document = load_map(folder / "bit_widths.json", env.layers)
        assert document["budget"] == {"bytes": 900} and env.default_budget.within(bit_widths)
        assert all(env.default_budget.within(episode.bit_widths) for episode in read_trace(folder / "trace.jsonl"))
        with pytest.raises(ArqError, match="differs in budget"):
            search_toy(folder, algorithm, 60, env=make_toy_env(budget={"bytes": 901}))


def test_one_agent_for_every_number_of_bytes(tmp_path):
    env = make_toy_env(budget={"bytes": 2_000})
    least = env.default_budget.least({})
    drawn = DrawnBudget(env, least, 900)
    costs, rewards = drawn.uniform_rewards
    assert np.exp(costs[0]) == pytest.approx(least) and np.exp(costs[-1]) > 900 > np.exp(costs[-2])
    assert rewards[1] == env.judge(uniform(env.layers, 3, 8))["reward"]
    train_for_any_budget("td3+demonstrations", env, (least, 900), episodes=6, folder=tmp_path, progress=False)
    assert len(read_trace(tmp_path / "trace.jsonl")) == 6
    with pytest.raises(ArqError, match="give a single one"):
        DrawnBudget(make_toy_env(budget={"bytes": 900, "bops": 0.03}), 0.02, 0.03)


def test_bit_operations_are_observed_as_ever():
    """What the agent sees of the budget, and the maps that its actions come to, as before there were other budgets."""
    seen, maps = hashlib.sha256(), hashlib.sha256()
    for env, low in (
        (make_toy_env(fix={"first": "4/4", "last": "4/4"}), 0.01),
        (tied_env(0.05), 0.045),
        (make_env_of_signs(), 0.0052),
    ):
        env.judge = lambda bit_widths: {"reward": 0.0, "map": bit_widths}
        for seed in range(20):
            rng = np.random.default_rng(seed)
            observation, _ = env.reset(options={"budget": rng.uniform(low, 3 * low)})
            for action in rng.uniform(-1, 1, (env.horizon, 2)):
                seen.update(observation[10:].tobytes())
                observation, _, _, _, info = env.step(action)
            seen.update(observation[10:].tobytes())
            maps.update(json.dumps(info["map"]).encode())
    assert (seen.hexdigest()[:16], maps.hexdigest()[:16]) == ("7d494ad5eae42b48", "cdfe46211ba5b693")


def make_env_of_signs() -> ArqEnv:
    return gymnasium.make("ARQ-ResNet20-Signs-v0").unwrapped
