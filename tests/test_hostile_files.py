"""Maps, cards, traces and configurations with anything in them: they are read as they say, or refused in one sentence."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from arq_agents.run_folder import read_config
from arq_agents.search import search
from arq_agents.trace import Episode, append_episode, count_episodes, read_trace
from arq_env import ArqError
from arq_env.bitwidths import Bits, bops_fraction, load_map, save_map, uniform
from arq_env.quantization import Quantizer, load_quantized, save_quantized
from arq_env.support.files import sha256, write_json
from tests.hostile import hostile, outcome_of
from tests.toy import make_toy_env, search_toy, toy_network, toy_problem

LAYERS = toy_problem().layers
HEADER = {"network": "toy", "dataset": "toy", "sigma": 0.5, "budget": 0.02, "metrics": {}, "provenance": {}}
ODD = [
    None,
    True,
    0,
    1,
    -1,
    4,
    9,
    100,
    2.0,
    3.5,
    10**19,
    10**400,
    float("nan"),
    float("inf"),
    "4",
    "",
    "middle",
    [],
    [4, 4],
    {},
    {"a": 1},
]


def places(document, path=()):
    """The path of every entry in nested dicts and lists."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def changed(document, path, change):
    """A copy with one entry changed, or without it."""
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if change == "gone":
        del inner[path[-1]]
    else:
        inner[path[-1]] = change
    return document


def changes(document):
    """Strategy: ``document`` with one or two entries changed."""

    def once(document):
        return st.builds(changed, st.just(document), st.sampled_from(list(places(document))), st.sampled_from(["gone", *ODD]))

    return once(document) | once(document).flatmap(lambda changed: once(changed) if changed else st.just(changed))


def document_of(write, tmp_path):
    write(tmp_path / "document.json")
    return json.loads((tmp_path / "document.json").read_text())


@pytest.fixture(scope="module")
def map_document(tmp_path_factory):
    return document_of(lambda path: save_map(path, uniform(LAYERS, 3, 5), LAYERS, **HEADER), tmp_path_factory.mktemp("map"))


@hostile
@given(data=st.data())
def test_maps(tmp_path, map_document, data):
    document, path = data.draw(changes(map_document)), tmp_path / "map.json"
    path.write_text(json.dumps(document))
    read, refused = outcome_of(lambda: load_map(path, LAYERS), tmp_path)
    if not refused:
        bit_widths, rest = read
        assert list(bit_widths) == [layer.name for layer in LAYERS] and 0 < bops_fraction(bit_widths, LAYERS) < 0.07
        budget = rest.get("budget")  # limits by kind are read where the network is known
        assert budget is None or isinstance(budget, dict) or 0 < budget <= 1


@hostile
@given(st.binary(max_size=200))
def test_bytes(tmp_path, data):
    for name, read in (
        ("bit_widths.json", lambda path: load_map(path, LAYERS)),
        ("config.json", read_config),
        ("trace.jsonl", read_trace),
        ("a.safetensors", lambda path: load_quantized(path, toy_network())),
    ):
        (tmp_path / "a.json").write_bytes(data)
        (tmp_path / name).write_bytes(data)
        outcome_of(lambda read=read, name=name: read(tmp_path / name), tmp_path)


def test_a_map_that_is_edited_by_hand(tmp_path, map_document):
    path = tmp_path / "map.json"
    path.write_text(
        "\ufeff" + json.dumps(map_document, indent=1), encoding="utf-8", newline="\r\n"
    )  # as editors on Windows save it
    assert load_map(path, LAYERS)[0] == uniform(LAYERS, 3, 5)
    twice = map_document | {"layers": [*map_document["layers"], map_document["layers"][1] | {"weight_bits": 8}]}
    for document, message in (
        (twice, "names layer 'middle' twice"),
        (changed(map_document, ("layers", 1, "macs"), 5), "'middle' has 5 macs where it has 36864"),
        (changed(map_document, ("layers", 2, "parameters"), 5), "'deep' has 5 parameters where it has 64"),
        (map_document | {"budget": 0}, "budget 0"),
    ):
        path.write_text(json.dumps(document))
        with pytest.raises(ArqError, match=message):
            load_map(path, LAYERS)
    path.write_text("[" * 200_000)
    for read in (lambda: load_map(path, LAYERS), lambda: read_config(path)):
        with pytest.raises(ArqError, match="nests too deep"):
            read()
    with pytest.raises(ArqError, match="cannot be read"):
        load_map(tmp_path, LAYERS)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A file of a quantized network with mixed bits: its tensors and its card."""
    problem, path = toy_problem(), tmp_path_factory.mktemp("quantized") / "network.safetensors"
    bits = dict(zip((layer.name for layer in LAYERS), (Bits(8, 8), Bits(2, 3), Bits(4, 5), Bits(8, 8)), strict=True))
    save_quantized(Quantizer(problem.network, LAYERS, problem.calibration_images()).quantize(bits), path, {"network": "toy"})
    return load(path.read_bytes()), json.loads(path.with_suffix(".json").read_text())


def write_quantized(path, tensors, card):
    path.write_bytes(save(tensors))
    write_json(path.with_suffix(".json"), card | {"digest": sha256(path.read_bytes())})
    return load_quantized(path, toy_network())[0]


@hostile
@given(data=st.data())
def test_cards(tmp_path, quantized, data):
    tensors, card = quantized
    card = data.draw(changes({key: card[key] for key in ("network", "layers")}))
    network, refused = outcome_of(lambda: write_quantized(tmp_path / "network.safetensors", tensors, card))
    if refused:
        return
    for layer in card["layers"]:  # what is loaded is what the card says, and what a map may say
        module = network.get_submodule(layer["name"])
        assert (module.weight_bits, module.activation_bits) == (layer["weight_bits"], layer["activation_bits"])
        assert 2 <= module.weight_bits <= 8 and 2 <= module.activation_bits <= 8
        distinct = max(len(channel.unique()) for channel in module.weight)
        assert distinct <= 2**module.weight_bits


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("middle.codes", lambda c: c + 1, "'middle' has other weights.*2 bits"),
        ("middle.codes", lambda c: 0 * c + 5, "'middle' has other weights.*2 bits"),
        ("deep.codes", lambda c: 0 * c - 8, "'deep' has other weights.*4 bits"),
        ("deep.codes", lambda c: c.float(), "'deep' has weights of torch.float32"),
        ("deep.codes", lambda c: c.to(torch.uint8), "'deep' has weights of torch.uint8"),
        ("middle.codes", lambda c: c[:, :, 1:2, 1:2].contiguous(), r"shape \(8, 8, 1, 1\), where .* \(8, 8, 3, 3\)"),
        *(
            (f"deep.{step}_step", change, f"'deep' has no {step}_step")
            for step in ("activation", "weight")
            for change in (
                lambda s: -s,
                lambda s: 0 * s,
                lambda s: s * NAN,
                lambda s: s * INF,
                lambda s: s.repeat(2),
                lambda s: s.half(),
                lambda s: s.double(),
            )
        ),
        ("norm.running_mean", lambda m: m * NAN, "norm.running_mean holds NaN"),
        ("norm.running_mean", lambda m: m.double(), "norm.running_mean is torch.float64"),
        ("last.bias", lambda b: b[:2].clone(), "last.bias"),
    ],
)
def test_tensors_that_are_not_what_the_card_says(tmp_path, quantized, name, change, message):
    tensors, card = quantized
    with pytest.raises(ArqError, match=message):
        write_quantized(tmp_path / "network.safetensors", tensors | {name: change(tensors[name])}, card)


@pytest.fixture
def first_version(quantized):
    """The same file as the first version wrote it: integers times steps, and only the sign of activations."""
    tensors, card = copy.deepcopy(quantized)
    for layer in card["layers"]:
        codes, step = tensors.pop(f"{layer['name']}.codes"), tensors.pop(f"{layer['name']}.weight_step")
        tensors[f"{layer['name']}.weight"] = codes * step.view(-1, *[1] * (codes.dim() - 1))
        layer["signed_activations"] = layer.pop("lowest_activation") < 0
    return tensors, card


def test_files_of_the_first_version(tmp_path, quantized, first_version):
    now, before = (write_quantized(tmp_path / "network.safetensors", *files) for files in (quantized, first_version))
    torch.testing.assert_close(now.middle.weight, before.middle.weight)
    assert before.middle.weight_bits == 2 and (before.middle.lowest, before.middle.highest) == (0, 7)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("middle.weight", lambda w: w * 1.01 ** torch.arange(w.numel()).view(w.shape), "'middle' has other weights"),
        ("deep.weight", lambda w: w + 0.1 * w.abs().max() * torch.rand(w.shape), "'deep' has other weights"),
        ("deep.weight", lambda w: w * (1 + 1e-4 * torch.rand(w.shape)), "'deep' has other weights"),
        ("middle.weight", lambda w: torch.where(w == w[0, 0, 0, 0], 0, w), "'middle' has other weights"),
        ("deep.weight", lambda w: torch.full_like(w, NAN), "'deep' has weights that are not float32, or NaN"),
        ("deep.weight", lambda w: torch.full_like(w, INF), "'deep' has weights that are not float32, or NaN or infinite"),
        ("middle.weight", lambda w: w.double(), "'middle' has weights that are not float32"),
        ("middle.weight", lambda w: w[:, :, 1:2, 1:2].contiguous(), r"shape \(8, 8, 1, 1\)"),
    ],
)
def test_weights_between_their_levels(tmp_path, first_version, name, change, message):
    tensors, card = first_version
    torch.manual_seed(0)
    with pytest.raises(ArqError, match=message):
        write_quantized(tmp_path / "network.safetensors", tensors | {name: change(tensors[name])}, card)


def test_cards_of_other_layers(tmp_path, quantized, first_version):
    tensors, card = quantized
    path = tmp_path / "network.safetensors"
    for layers, message in (
        ([*card["layers"], card["layers"][1]], "'middle' twice"),
        ([card["layers"][0] | {"name": "norm"}], "'norm' is a BatchNorm2d"),
        ([card["layers"][0] | {"name": ""}], "'' is a ToyNet"),
        (card["layers"][1:], "first.codes"),
        ([changed(card["layers"][2], ("weight_bits",), 2)], "2 bits do not have"),
    ):
        with pytest.raises(ArqError, match=message):
            write_quantized(path, tensors, card | {"layers": layers})
    for bits in (None, 0, -1, 3.5, "4", [], 100, True):
        for key in ("weight_bits", "activation_bits"):
            with pytest.raises(ArqError, match=f"'middle' has {key}"):
                write_quantized(path, tensors, changed(card, ("layers", 1, key), bits))
    for lowest in (None, 1, -8, -0.0, "0", False):
        with pytest.raises(ArqError, match="'middle' has lowest_activation"):
            write_quantized(path, tensors, changed(card, ("layers", 1, "lowest_activation"), lowest))
    for signed in (None, 1, "no"):
        with pytest.raises(ArqError, match="'middle' has signed_activations"):
            write_quantized(path, first_version[0], changed(first_version[1], ("layers", 1, "signed_activations"), signed))


@pytest.mark.parametrize(
    "header",
    [{"shape": [10**18], "data_offsets": [0, 4 * 10**18]}, {"shape": [2**62, 4], "data_offsets": [0, 0]}, {"shape": [2**70]}],
)
def test_sizes_that_no_memory_holds(tmp_path, header):
    text = json.dumps({"a": {"dtype": "F32", "data_offsets": [0, 0]} | header}).encode()
    for data in (len(text).to_bytes(8, "little") + text, (2**63).to_bytes(8, "little") + text):
        (tmp_path / "a.safetensors").write_bytes(data)
        write_json(tmp_path / "a.json", {"network": "resnet20", "layers": [], "digest": sha256(data)})
        with pytest.raises(ArqError, match="cannot be loaded"):
            load_quantized(tmp_path / "a.safetensors")


EPISODE = Episode(1, -0.5, uniform(LAYERS, 3, 5), 0.01, 0.4, 0.6, 0.3, 0.5, 1.0, 1, 2.0)


@pytest.fixture(scope="module")
def episode_document(tmp_path_factory):
    return document_of(lambda path: append_episode(path, EPISODE), tmp_path_factory.mktemp("trace"))


@hostile
@given(data=st.data())
def test_traces(tmp_path, episode_document, data):
    path, document = tmp_path / "trace.jsonl", data.draw(changes(episode_document))
    path.write_text(json.dumps(document) + "\n")
    episodes, refused = outcome_of(lambda: read_trace(path), tmp_path)
    assert not refused or "line 1" in refused
    for episode in episodes or []:
        assert np.isfinite([episode.reward, episode.acr, episode.seconds]).all()
        assert all(2 <= bit <= 8 for bits in episode.bit_widths.values() for bit in bits)


def test_traces_edited_by_hand(tmp_path):
    path = tmp_path / "trace.jsonl"
    append_episode(path, EPISODE)
    line = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + line.replace(b"\n", b"\r\n") + line.replace(b"\n", b"\r\n") + line[:30])
    assert read_trace(path) == [EPISODE, EPISODE] and count_episodes(path) == 2
    for bad in (b"[" * 200_000 + b"\n", b'{"episode": 1e999}\n', b"\n", b"NaN\n"):
        path.write_bytes(line + bad)
        with pytest.raises(ArqError, match="line 2"):
            read_trace(path)
    for read in (read_trace, count_episodes):
        with pytest.raises(ArqError, match="cannot be read"):
            read(tmp_path)


@pytest.mark.slow
def test_a_finished_run_whose_map_says_nonsense_is_exported_anew(tmp_path):
    env = make_toy_env()
    best, path = search_toy(tmp_path, "random", episodes=2, env=env), tmp_path / "bit_widths.json"
    whole = json.loads(path.read_text())
    for damage in (
        [whole],
        *(changed(whole, ("metrics", "episode"), episode) for episode in (3.5, "4", -5, True, None, [1], 10**19)),
    ):
        path.write_text(json.dumps(damage))
        assert search_toy(tmp_path, "random", episodes=2, env=env).same_outcome(best)
        assert json.loads(path.read_text())["metrics"] == whole["metrics"]


@hostile
@given(data=st.data())
def test_configurations(run_folder, data):
    folder, whole, env = run_folder
    (folder / "config.json").write_text(json.dumps(data.draw(changes(whole))))
    _, refused = outcome_of(lambda: search("random", env, episodes=2, folder=folder, progress=False))
    assert not refused or "it differs in" in refused


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder, env = tmp_path_factory.mktemp("run"), make_toy_env()
    search_toy(folder, "random", episodes=2, env=env)
    return folder, json.loads((folder / "config.json").read_text()), env
