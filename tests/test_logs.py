"""Certification logs: what others wrote, what was cut, what cannot be."""

import json
import resource
import signal

import numpy as np
import pytest
import torch

from arq_env import ArqError
from arq_env.certification import ABSTAINED, Certificates, cache_predictions, certify
from tests.test_certify import halfspace

HEAD, ROW = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n", "0\t3\t3\t0.5\t1\t0:00:01\n"
IMAGES = np.linspace(0.3, 0.45, 40, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 4, 4), np.float32)
ASK = {"sigma": 0.5, "n0": 8, "n": 32, "name": "halfspace"}
LABELS = np.zeros(40, int)


def read(tmp_path, text: str) -> Certificates:
    (tmp_path / "log").write_bytes(text.encode())
    return Certificates.from_tsv(tmp_path / "log")


@pytest.mark.parametrize(
    "text, seconds",
    [
        (HEAD + ROW + "\n", [1]),
        (HEAD + "\n" + ROW + "  \n", [1]),
        ("\ufeff" + HEAD + ROW, [1]),
        ((HEAD + ROW).replace("\n", "\r\n"), [1]),
        (HEAD + ROW.removesuffix("\n"), [1]),
        (HEAD + ROW + HEAD + ROW.replace("0", "1", 1), [1, 1]),
        (HEAD + ROW.replace("0:00:01", "1 day, 2:03:04.5"), [93_784.5]),
        (HEAD + ROW.replace("0:00:01", "2 days, 0:00:01"), [172_801]),
        (HEAD + ROW.replace("3\t3\t0.5\t1", "-1\t-1\t0.0\t1"), [1]),  # as earlier versions wrote an unknown label
        (HEAD + ROW + HEAD.replace("\n", "\tn\tdraw\n") + "1\t3\t3\t0.5\t1\t1.0\t20\tnan\n", [1, 1]),
    ],
)
def test_logs_that_people_have_are_read(tmp_path, text, seconds):
    got = read(tmp_path, text)
    assert got.seconds.tolist() == seconds and set(got.radius[got.label == 3]) <= {0.5}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no header"),
        (HEAD, "no image"),
        (ROW, "the header is"),
        (HEAD + ROW + ROW[:7], "line 3 has 4 columns of 6"),
        (HEAD + ROW + ROW, "line 3: idx 0 is there twice"),
        (HEAD + ROW.replace("0.5", "nan"), "line 2: radius nan"),
        (HEAD + ROW.replace("0.5", "inf"), "line 2: radius inf"),
        (HEAD + ROW.replace("0.5", "-0.5"), "line 2: radius -0.5"),
        (HEAD + ROW.replace("0:00:01", "nan"), "time nan"),
        (HEAD + ROW.replace("\t1\t", "\t0\t"), "correct is 0 for label 3 and prediction 3"),
        (HEAD + ROW.replace("\t3\t0.5", "\t4\t0.5"), "correct is 1"),
        (HEAD + ROW.replace("\t3", "\t-2"), "negative"),
        (HEAD + "-" + ROW.replace("0", "1", 1), "negative"),
        (HEAD + ROW.replace("3", "3.5", 1), "line 2: invalid literal"),
        (HEAD + ROW.replace("3", "9" * 30), "large|long"),
        (HEAD.replace("\n", "\tn\tdraw\n") + ROW.replace("\n", "\t20\t1.5\n"), "draw is 1.5"),
    ],
)
def test_what_no_log_says_is_refused(tmp_path, text, message):
    with pytest.raises(ArqError, match=message):
        read(tmp_path, text)


def test_a_log_whose_line_ends_were_changed_is_gone_on_with(tmp_path):
    """As Windows, git or an editor leaves it."""
    log = tmp_path / "log.tsv"
    expected = certify(halfspace, IMAGES, LABELS, log=log, **ASK)
    head, *rows = log.read_text().splitlines()
    for cut in ("", rows[16][:9]):
        before = ("\ufeff" + head + "\r\n" + "".join(row + "\r\n" for row in rows[:16]) + "\r\n").encode()
        log.write_bytes(before + cut.encode())
        for _ in range(2):
            got = certify(halfspace, IMAGES, LABELS, log=log, **ASK)
            assert got.radius.tolist() == expected.radius.tolist() == Certificates.from_tsv(log).radius.tolist()
            assert log.read_bytes().startswith(before)


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log.write_text(log.read_text().replace("\n3\t0", "\n40\t0")),
        lambda log: log.write_text(log.read_text().replace("\n3\t0\t", "\n3\t1\t")),
        lambda log: log.write_text(log.read_text().replace("\n3\t0\t", "\n2\t0\t")),
        lambda log: log.write_text(log.read_text().replace("\t32\t", "\tmany\t")),
        lambda log: log.write_text(""),
        lambda log: log.with_name(log.name + ".settings.json").write_text("[" * 100_000),
        lambda log: log.with_name(log.name + ".settings.json").write_text("[]"),
        lambda log: log.with_name(log.name + ".settings.json").unlink(),
    ],
)
def test_a_log_that_was_changed_is_not_gone_on_with(tmp_path, damage):
    log = tmp_path / "log.tsv"
    certify(halfspace, IMAGES, LABELS, log=log, **ASK)
    damage(log)
    before = log.read_bytes()
    with pytest.raises(ArqError, match="cannot be gone on with .*remove it"):
        certify(halfspace, IMAGES, LABELS, log=log, **ASK)
    assert log.read_bytes() == before


def test_unknown_labels_are_never_right(tmp_path):
    coin = np.arange(32) % 2

    def undecided(batch):
        return np.resize(coin, len(batch))

    got = certify(undecided, IMAGES[:2], [-1, -1], log=tmp_path / "log.tsv", **ASK)
    assert (got.prediction == ABSTAINED).all()
    assert [line.split("\t")[4] for line in (tmp_path / "log.tsv").read_text().splitlines()[1:]] == ["0", "0"]
    assert not Certificates.from_tsv(tmp_path / "log.tsv").correct.any()


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "below", tmp_path / ("x" * 300), "/proc/no/such", "a\0b", "", b"bytes", 3, True):
        with pytest.raises(ArqError) as caught:
            certify(halfspace, IMAGES, LABELS, log=path, **ASK)
        assert "\n" not in str(caught.value)
        with pytest.raises(ArqError) as caught:
            cache_predictions(halfspace, IMAGES, path=path, **ASK)
        assert "\n" not in str(caught.value)
    with pytest.raises(ArqError, match="path is None"):
        Certificates.from_tsv(None)


def test_a_full_disk_loses_no_row(tmp_path):
    """One line, and the rows that fitted are gone on with."""
    log, expected = tmp_path / "log.tsv", certify(halfspace, IMAGES, LABELS, **ASK)
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
        with pytest.raises(ArqError, match="cannot write .*free some space"):
            certify(halfspace, IMAGES, LABELS, log=log, **ASK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    done, asked = log.read_text().count("\n") - 1, []

    def counting(batch):
        asked.append(len(batch))
        return halfspace(batch)

    got = certify(counting, IMAGES, LABELS, log=log, **ASK)
    assert got.radius.tolist() == expected.radius.tolist()
    assert done >= 16 and sum(asked) == (40 - done) * (ASK["n0"] + ASK["n"])


def test_a_cache_whose_counts_are_not_its_predictions_is_refused(tmp_path):
    path = tmp_path / "cache.npz"
    made = cache_predictions(halfspace, torch.from_numpy(IMAGES), path=path, **ASK)
    with np.load(path) as stored:
        fields = dict(stored)
    for name, value in (("counts", made.counts + 1), ("counts", made.counts[:3]), ("digests", "x"), ("classes", "x")):
        np.savez(path, **fields | {name: np.asarray(value)})
        with pytest.raises(ArqError, match="not a prediction cache"):
            cache_predictions(halfspace, torch.from_numpy(IMAGES), path=path, **ASK)
    path.write_text(json.dumps({}))
    with pytest.raises(ArqError, match="not a prediction cache"):
        cache_predictions(halfspace, torch.from_numpy(IMAGES), path=path, **ASK)
