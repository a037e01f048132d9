"""Which layers are fixed and at what, and which bit-widths there are: what is refused, what is written, and what comes back."""

import json
import pickle

import gymnasium
import numpy as np
import pytest

from arq_agents import command_line, shared_options
from arq_agents.haq import absolute_bits
from arq_agents.run_folder import export_map
from arq_agents.validation import Sample, check_folder
from arq_env import ArqError
from arq_env.bitwidths import complete, fixed_layers, free_layers, restrict, uniform, widths_of
from arq_env.budget import BopsBudget
from arq_env.env import next_bits
from arq_env.problem import load_mapped
from arq_env.sensitivity import places
from arq_env.support.engines import Engine
from tests.own import arguments_of
from tests.test_layers_and_budget import LAYERS, TIED
from tests.toy import make_toy_env, search_toy

FIX = {"first": "8/8", "stage1.*": "4/8", "fc": "2/4"}


def test_names_become_layers():
    restricted = restrict(LAYERS, FIX, [8, 2, 4, 4])
    assert widths_of(restricted) == (2, 4, 8) and len(fixed_layers(restricted)) == 8
    assert fixed_layers(restricted)["stage1.2.conv2"] == (4, 8) and fixed_layers(restricted)["fc"] == (2, 4)
    assert [layer.name for layer in free_layers(restricted)] == [layer.name for layer in LAYERS[7:-1]]
    assert {name for name, _ in places(restricted)} == {layer.name for layer in LAYERS[7:-1]}
    assert uniform(restricted, 2, 4)["conv"] == (8, 8) and uniform(restricted, 2, 4)["stage3.0.conv1"] == (2, 4)
    again = pickle.loads(pickle.dumps(restricted))
    assert (again, again.fixed, again.widths) == (restricted, restricted.fixed, restricted.widths)


def test_by_default_the_ends_are_fixed_at_8():
    assert restrict(LAYERS).fixed is None and fixed_layers(LAYERS) == {"conv": (8, 8), "fc": (8, 8)}
    said = restrict(LAYERS, {"first": "8/8", "last": "8/8"}, list(range(2, 9)))
    assert free_layers(said) == free_layers(LAYERS) and widths_of(said) == widths_of(LAYERS) == tuple(range(2, 9))
    assert complete({}, said) == complete({}, LAYERS)


@pytest.mark.parametrize(
    "fix, bits, message",
    [
        ("first=8/8", None, "fix is 'first=8/8': give a dictionary"),
        ({8: "8/8"}, None, "give a dictionary"),
        ({"first": "9/8"}, None, "'9/8' for 'first': give weight and activation bits from 2/2 to 8/8"),
        ({"first": [8, 8]}, None, "give weight and activation bits"),
        ({"head.*": "4/8"}, None, "'head.*', and no layer is called so: choose of conv, stage1.0.conv1"),
        ({"fc": "4/4", "last": "8/8"}, None, "two values for layer 'fc', by 'fc' and by 'last'"),
        ({"*": "4/4"}, None, "leaves nothing to choose"),
        (None, [2, 4], "'conv' is fixed at 8/8, and there are 2, 4 bits: fix it at these, such as fix={'first': '4/4'"),
        ({}, [], r"bits is \[\]: give a list of whole numbers from 2 to 8"),
        ({}, [1, 2], "whole numbers from 2 to 8"),
        ({}, [2.0], "whole numbers from 2 to 8"),
        ({}, [True], "whole numbers from 2 to 8"),
        ({}, 4, "bits is 4"),
        ({}, "48", "bits is '48'"),
    ],
)
def test_what_is_not_understood_is_refused(fix, bits, message):
    with pytest.raises(ArqError, match=message.replace("*", r"\*")):
        restrict(LAYERS, fix, bits)


def test_layers_that_read_one_tensor_are_fixed_alike():
    for fix, message in (
        ({"shortcut1": "4/4"}, "fix both, or the first alone"),
        ({"conv1": "4/4", "shortcut1": "4/8"}, "fix both at the same activation bits"),
    ):
        with pytest.raises(ArqError, match=message):
            restrict(TIED, fix)
    restricted = restrict(TIED, {"conv1": "8/3"})
    assert uniform(restricted, 4, 4)["shortcut1"] == (4, 3)


def test_a_layer_that_is_called_first():
    layers = restrict(TIED, {})
    renamed = type(TIED)([type(layers[0])(**vars(a) | {"name": "first"}) if a.name == "conv2" else a for a in TIED[:4]])
    with pytest.raises(ArqError, match=r"write '\[f\]irst' for that layer"):
        restrict(renamed, {"first": "8/8"})
    assert fixed_layers(restrict(renamed, {"[f]irst": "8/8"})) == {"first": (8, 8)}


def test_an_infeasible_budget_says_what_these_bits_reach():
    layers = restrict(LAYERS, {"first": "4/4", "last": "8/4"}, [4, 8])
    with pytest.raises(ArqError, match="4 bits wherever they are not fixed") as error:
        BopsBudget(layers, 0.005)
    least = float(str(error.value).split("least reachable is ")[1].split()[0])
    assert least == pytest.approx(BopsBudget(layers, 1.0).amount(uniform(layers, 4, 4)), abs=1e-6)
    BopsBudget(layers, least)


def test_actions_reach_the_next_bits():
    budget = BopsBudget(restrict(LAYERS, {}, [2, 4, 8]), 0.0157)  # an even share is 4 bits
    assert [next_bits(np.full(2, action), budget, {}) for action in (-1, 0, 0.4)] == [(2, 2), (4, 4), (4, 4)]
    assert next_bits(np.array([1, -1]), budget, {}) == (8, 2)
    assert {absolute_bits(action, (2, 4, 8)) for action in np.linspace(0, 1, 50)} == {2, 4, 8}
    assert BopsBudget(restrict(LAYERS, {}, [8]), 1.0).even_bits({}) == (8, 8)


@pytest.mark.parametrize("name", ["ARQ-Custom-v0", "ARQ-ResNet20-Signs-v0"])
def test_files_say_it_and_it_comes_back(name, tmp_path):
    own = name == "ARQ-Custom-v0"
    fix = {"stem": "8/8", "head": "4/8"} if own else {"first": "8/8", "stage1.*": "4/8"}
    env = gymnasium.make(name, **{"images": 12} | arguments_of(name), fix=fix, bits=[4, 8], **({"budget": 0.1} if not own else {}))
    env = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json())).unwrapped
    bit_widths = env.decode(np.random.default_rng(0).uniform(-1, 1, (env.horizon, 2)))
    export_map(tmp_path, env, bit_widths, env.default_budget.spec, {})
    problem, found, *_ = load_mapped(tmp_path)
    assert found == bit_widths and problem.layers.fixed == env.layers.fixed and problem.layers.widths == (4, 8)
    assert problem.digest == env.problem.digest and {bits for pair in found.values() for bits in pair} <= {4, 8}


def test_a_search_writes_it_and_goes_on_with_nothing_else(tmp_path):
    choice = {"fix": {"first": "4/4"}, "bits": [2, 4]}
    found = search_toy(tmp_path, "integer_program", 2, make_toy_env(**choice), confirming_steps=0).bit_widths
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["fix"] == choice["fix"] and config["bits"] == choice["bits"] and found["first"] == (4, 4)
    with pytest.raises(ArqError, match="differs in bits, fix"):
        search_toy(tmp_path, "integer_program", 2, make_toy_env(), confirming_steps=0)


def test_a_folder_from_before_there_was_a_choice(tmp_path):
    search_toy(tmp_path, "uniform", 1, confirming_steps=0)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["fix"], config["bits"]
    path.write_text(json.dumps(config | {"end_bits": 8}))
    search_toy(tmp_path, "uniform", 2, confirming_steps=0)
    path.write_text(json.dumps(config | {"end_bits": 4}))
    with pytest.raises(ArqError, match="holds another search"):
        search_toy(tmp_path, "uniform", 2, confirming_steps=0)


def test_validation_sees_bits_that_are_not_there(tmp_path):
    env = gymnasium.make("ARQ-Custom-v0", **arguments_of("ARQ-Custom-v0") | {"images": 12}, fix={"last": "8/8"}, bits=[4, 8])
    search_toy(tmp_path, "random", 2, env, confirming_steps=0)
    assert all(check.holds is not False for check in check_folder(tmp_path, Sample(episodes=1, images=1), Engine()))
    document = json.loads((tmp_path / "bit_widths.json").read_text())
    document["provenance"]["bits"] = [8]
    (tmp_path / "bit_widths.json").write_text(json.dumps(document))
    wrong = {check.what: check.told for check in check_folder(tmp_path, Sample(episodes=1, images=1), Engine()) if not check.holds}
    assert "bits that are not there" in wrong["the trace"] and "bits" in wrong["what evaluations depend on"]


def test_on_a_command_line():
    parser = command_line.parser("")
    shared_options.add_environment(parser)
    options = parser.parse_args(["--fix", "first=8/8", "head.*=4/8", "--bits", "2", "4", "8"])
    assert options.fix == {"first": "8/8", "head.*": "4/8"} and options.bits == [2, 4, 8]
    assert shared_options.label(options) == "-fix-first-8-8-head.--4-8-bits-2-4-8"
    assert parser.parse_args(["--fix"]).fix == {} and parser.parse_args([]).fix is None
    for wrong in (["first"], ["first=8/8", "first=4/4"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--fix", *wrong])


def test_a_report_is_of_every_second_test_image():
    parser = command_line.parser("A script.")
    shared_options.add_test_settings(parser)
    shared_options.add_protocol(parser)
    for given, every, ending in (([], 20, ""), (["--every", "5"], 5, ""), (["--protocol", "report", "--every", "5"], 2, "-report")):
        options = shared_options.by_protocol(parser.parse_args(given))
        assert (options.every, options.ending, options.n) == (every, ending, 1_000)
