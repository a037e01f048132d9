"""Files and arguments with anything in them: read as they say or refused in one sentence; nothing hangs, grows or is written.

Maps, cards, traces and configurations are in :mod:`tests.test_hostile_files`, the arguments of the certifiers in
:mod:`tests.test_inputs`, those of ``gym.make``, actions and reset options in :mod:`tests.test_env`.
"""

import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import arq_env
from arq_env import ArqError, bitwidths, certification, datasets, problem, quantization
from arq_env.bitwidths import save_map, uniform
from arq_env.budget import LatencyBudget, make_budget
from arq_env.certification import Certificates, PredictionCache, cache_predictions, certify
from arq_env.quantization import Quantizer, load_quantized, save_quantized
from arq_env.support.files import sha256, write_json
from tests.hostile import hostile, outcome_of
from tests.test_certify import halfspace
from tests.test_hostile_files import HEADER, ODD, changes
from tests.test_inputs import ASK, IMAGES, WRONG
from tests.toy import toy_network, toy_problem

LAYERS = toy_problem().layers
LABELS = np.array([0, 0, 1, 1, 1])


def damaged(whole: bytes) -> st.SearchStrategy:
    """Strategy: the bytes cut, with some overwritten, or with some put in."""

    def damage(place, kind, piece):
        return {"cut": whole[:place], "over": whole[:place] + piece + whole[place + len(piece) :]}.get(
            kind, whole[:place] + piece + whole[place:]
        )

    return st.builds(damage, st.integers(0, len(whole)), st.sampled_from(["cut", "over", "in"]), st.binary(min_size=1, max_size=8))


NUMBERS = st.sampled_from(
    ["", "-1", "0", "1", "2", "nan", "inf", "-inf", "1e999", "1" * 5_000, "9" * 30, "0x1", "1_0", "é", "1:1:1"]
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.tsv"
    certify(halfspace, IMAGES, LABELS, log=path, name="half", **ASK)
    return path.read_bytes(), path.with_name("log.tsv.settings.json").read_bytes()


@hostile
@given(data=st.data())
def test_certificate_logs(tmp_path, log, data):
    """One that is not wholly right is neither read nor gone on with, and stays as it is."""
    path, beside = tmp_path / "log.tsv", tmp_path / "log.tsv.settings.json"
    rows = [line.split("\t") for line in log[0].decode().splitlines()]
    for _ in range(data.draw(st.integers(1, 2))):
        row = data.draw(st.integers(0, len(rows) - 1))
        rows[row][data.draw(st.integers(0, len(rows[row]) - 1))] = data.draw(NUMBERS)
    table = "".join("\t".join(row) + "\n" for row in rows).encode()
    path.write_bytes(data.draw(st.sampled_from([log[0], table]) | damaged(log[0])))
    beside.write_bytes(
        data.draw(st.just(log[1]) | changes(json.loads(log[1])).map(lambda j: json.dumps(j).encode()) | damaged(log[1]))
    )
    read, refused = outcome_of(lambda: Certificates.from_tsv(path), tmp_path)
    assert refused or np.isfinite(read.radius).all() and (read.radius >= 0).all() and (read.n >= 0).all()

    def go_on():
        certify(halfspace, IMAGES, LABELS, log=path, name="half", **ASK)
        return tmp_path

    outcome_of(go_on, tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "cache.npz"
    cache_predictions(halfspace, IMAGES, path=path, name="half", **ASK)
    with np.load(path) as stored:
        return path.read_bytes(), dict(stored)


def npz(arrays: dict, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in arrays.items():
            entry = io.BytesIO()
            np.save(entry, array)
            archive.writestr(f"{name}.npy", array if isinstance(array, bytes) else entry.getvalue())
    return file.getvalue()


def npy(shape: str, kind: str = "<i8") -> bytes:
    """An array that says it is of this shape, and holds nothing."""
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


ARRAYS = st.sampled_from(
    [np.array(value) for value in (0, -1, 2**62, 0.5, np.nan, np.inf, True, "ab", b"ab", 1j, [], [1, 2], np.zeros((5, 0)))]
    + [np.zeros(5), np.zeros((5, 12)), np.zeros((5, 12), np.uint8), np.full((5, 12), -1), np.full(5, "a" * 64)]
    + [
        npy("(1000000000000,)"),
        npy("(5, 1000000000)", "|u1"),
        npy("(-1,)"),
        npy("(1 << 70,)"),
        npy("()", "|O"),
        npy("(" * 200),
        b"",
    ]
)


@hostile
@given(data=st.data())
def test_cache_files(tmp_path, cache, data):
    whole, arrays = cache
    other = st.dictionaries(st.sampled_from(sorted(arrays)), ARRAYS, min_size=1, max_size=2).map(lambda new: npz(arrays | new))
    (tmp_path / "cache.npz").write_bytes(data.draw(other | damaged(whole)))
    read, refused = outcome_of(lambda: PredictionCache.load(tmp_path / "cache.npz"), tmp_path)
    if not refused:  # what is read is a whole cache
        assert read.predictions.shape == (len(read.digests), read.n) and read.n0 >= 1 and read.sigma > 0 and read.seed >= 0
        assert (read.classes >= 0).all() and ((read.counts >= 0) & (read.counts <= read.n)).all()


def test_a_cache_that_unpacks_to_more_than_the_file(tmp_path, cache):
    path = tmp_path / "cache.npz"
    path.write_bytes(npz(cache[1] | {"predictions": np.zeros((5, 10**7), np.uint8)}, zipfile.ZIP_DEFLATED))
    with pytest.raises(ArqError, match="not a prediction cache"):
        PredictionCache.load(path)


TIMES = {"layers": {layer.name: {"4/4": 0.1, "4/8": 0.2, "8/8": 0.3} for layer in LAYERS}, "beside": 0.05}
ROWS = [*ODD, [[1, 2]], [["8/8", 1]], ["ab"], {"8/8": None}, {"8/8": 1, "9/9": 1}, {"8/8": 1e999}, {"8/8": -0.0}]


@hostile
@given(data=st.data())
def test_latency_tables(tmp_path, data):
    path, table = tmp_path / "times.json", data.draw(changes(TIMES))
    if isinstance(table.get("layers"), dict) and data.draw(st.booleans()):
        table = table | {"layers": table["layers"] | {"middle": data.draw(st.sampled_from(ROWS))}}
    path.write_bytes(data.draw(st.just(json.dumps(table).encode()) | damaged(json.dumps(TIMES).encode())))
    milliseconds = data.draw(st.sampled_from([1.0, *ODD]))
    given = {"milliseconds": milliseconds, "table": str(path)}
    made, refused = outcome_of(lambda: make_budget({"latency": given}, toy_problem()), tmp_path)
    assert refused or isinstance(made, LatencyBudget) and 0 < made.amount(uniform(LAYERS, 8, 8)) < 1e10


@pytest.fixture(scope="module")
def network_file(tmp_path_factory):
    path, toy = tmp_path_factory.mktemp("network") / "network.safetensors", toy_problem()
    save_quantized(
        Quantizer(toy.network, LAYERS, toy.calibration_images()).quantize(uniform(LAYERS, 4, 4)), path, {"network": "toy"}
    )
    return path.read_bytes(), json.loads(path.with_suffix(".json").read_text()), sorted(load_file(path))


@hostile
@given(data=st.data())
def test_safetensors_headers(tmp_path, network_file, data):
    """The digest in the card is right: whoever changes the one can change the other."""
    whole, card, _ = network_file
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    odd = st.sampled_from([*ODD, [2**62, 4], [0], [-1], [0, 2**63], [10**18], "F64", "I8", "BF16", "BOOL", {"format": "pt"}])

    def rewritten(name, key, value, size):
        entry = header[name] | {key: value} if key else value
        text = json.dumps(header | {name: entry}).encode()
        return (len(text) if size is None else size).to_bytes(8, "little") + text + whole[8 + length :]

    names, keys = st.sampled_from([*header, "__metadata__"]), st.sampled_from(["dtype", "shape", "data_offsets"])
    edited = st.builds(
        rewritten,
        st.sampled_from([name for name in header if name != "__metadata__"]),
        keys,
        odd,
        st.sampled_from([None, 0, 2**63]),
    ) | st.builds(rewritten, names, st.none(), odd, st.none())
    content = data.draw(edited | damaged(whole[: 8 + length]).map(lambda head: head + whole[8 + length :]))
    (tmp_path / "network.safetensors").write_bytes(content)
    write_json(tmp_path / "network.json", card | {"digest": sha256(content)})
    for read in (load_quantized, arq_env.load):
        outcome_of(lambda read=read: read(tmp_path / "network.safetensors", toy_network()), tmp_path)


TEXTS = st.sampled_from(
    ["", ".", "/", "\0", "a\nb", "~", "..", "x" * 5_000, "a:b", ":", "os:system", "no.module:f", "a.npz", "\ud800"]
)
PLAIN = WRONG | TEXTS | st.sampled_from([uniform(LAYERS, 4, 4), {"first": (4, 4)}, {None: None}, LAYERS, LAYERS[:1]])
#: Of each public function that the tests beside this one leave out: how it is called with one or two values of any kind.
CALLS = {
    "arq_env.load": lambda a, b: arq_env.load(a, b),
    "certification.network_digest": lambda a, b: certification.network_digest(a, b),
    "certification.Certificates.from_tsv": lambda a, b: Certificates.from_tsv(a),
    "certification.PredictionCache.load": lambda a, b: PredictionCache.load(a),
    "quantization.load_quantized": lambda a, b: load_quantized(a, b),
    "quantization.integer_network": lambda a, b: quantization.integer_network(a),
    "bitwidths.load_map": lambda a, b: bitwidths.load_map(a, LAYERS),
    "bitwidths.check_map": lambda a, b: bitwidths.check_map(a, LAYERS),
    "bitwidths.uniform": lambda a, b: bitwidths.check_map(uniform(LAYERS, a, b), LAYERS),
    "budget.make_budget": lambda a, b: make_budget(a, toy_problem()),
    "budget.make_budget of kinds": lambda a, b: make_budget({"bops": a, "bytes": b}, toy_problem()),
    "budget.make_budget latency": lambda a, b: make_budget({"latency": {"milliseconds": a, "table": b}}, toy_problem()),
    "datasets.load_dataset": lambda a, b: datasets.load_dataset(a, image_size=b),
    "datasets.known_shape": lambda a, b: datasets.known_shape(a),
    "problem.load_problem": lambda a, b: problem.load_problem(a, b, sigma=0.5),
    "problem.load_mapped": lambda a, b: problem.load_mapped(a),
}


@pytest.mark.parametrize("name", CALLS)
@hostile
@given(first=PLAIN, second=PLAIN)
def test_arguments(tmp_path, monkeypatch, name, first, second):
    monkeypatch.chdir(tmp_path)
    save_map(tmp_path / "map.json", uniform(LAYERS, 4, 4), LAYERS, **HEADER)
    outcome_of(lambda: CALLS[name](first, second), tmp_path)
