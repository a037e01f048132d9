import errno
import fcntl
import os
import pickle
import signal
import sys
import threading
import time
import warnings

import pytest
import torch

from arq_agents import command_line
from arq_env import ArqError, __version__
from arq_env.bitwidths import uniform
from arq_env.datasets.cache import cache_folder
from arq_env.problem import load_problem
from arq_env.support import files, provenance
from tests.toy import make_toy_env


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor, original=os.fsync: done.append("sync") or original(descriptor))
    monkeypatch.setattr(os, "replace", lambda *paths, original=os.replace: done.append("rename") or original(*paths))
    files.write_json(tmp_path / "file.json", {"a": 1})
    assert done == ["sync", "rename", "sync"] and files.read_json(tmp_path / "file.json") == {"a": 1}


def test_json_that_is_read():
    assert files.parse_json(b'\xef\xbb\xbf{"a": [1, 2.5]}\r\n') == {"a": [1, 2.5]}  # as PowerShell saves it
    for data, part in [
        (b"[]", "not a JSON object"),
        (b"[" * 200_000, "nests too deep"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "digits"),
        (b"\xff\xfe{}", "utf-8"),
        (b"", "Expecting value"),
    ]:
        with pytest.raises(ValueError, match=part):
            files.parse_json(data)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, code):
    def unsupported(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="has no locks"):
        files.lock(tmp_path / "config.json").close()


def test_a_lock_that_is_held_or_cannot_be(tmp_path):
    with files.lock(tmp_path / "a"), pytest.raises(ArqError, match="another process"):
        files.lock(tmp_path / "a")
    files.lock(tmp_path / "a").close()
    with pytest.raises(ArqError, match="cannot write"):
        files.lock(tmp_path)
    with pytest.raises(ArqError, match="cannot write"):
        files.lock(tmp_path / "none" / "a")


@pytest.mark.parametrize(
    "data, kept",
    [(b"a\r\nb\r\n", b"a\r\nb\r\n"), (b"a\r\nb\r", b"a\r\n"), (b"a\nb", b"a\n"), (b"b", b""), (b"", b""), (b"\n\n", b"\n\n")],
)
def test_a_last_line_without_its_end_is_dropped(tmp_path, data, kept):
    (tmp_path / "log").write_bytes(data)
    files.drop_partial_line(tmp_path / "log")
    assert (tmp_path / "log").read_bytes() == kept
    with pytest.raises(ArqError, match="cannot write"):
        files.drop_partial_line(tmp_path)


def test_the_cache_folder_knows_home(monkeypatch):
    monkeypatch.setenv("ARQ_DATA", "~/somewhere")
    assert cache_folder().is_absolute() and cache_folder().name == "somewhere"


def test_provenance_is_of_the_code_and_of_the_processor_used(monkeypatch):
    monkeypatch.setattr(provenance.metadata, "version", lambda package: "0.0.1")  # what was installed once
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    said = provenance.provenance()
    assert said["versions"]["arq-env"] == __version__ and "cores" in said["hardware"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert provenance.provenance()["hardware"] == "a GPU"


def test_evaluators_are_pickled_without_what_is_made_again():
    evaluator = make_toy_env().evaluator
    bit_widths = uniform(evaluator.problem.layers, 4, 4)
    before = evaluator.reference.acr, evaluator.evaluate(bit_widths)
    data = pickle.dumps(evaluator)
    assert len(data) < 100_000  # calibration and data are some megabytes
    copy = pickle.loads(data)
    copy.problem.network.forward = lambda images: pytest.fail("evaluated again")
    assert (copy.reference.acr, copy.evaluate(bit_widths)) == before
    shipped = load_problem("resnet20", "signs")
    assert pickle.loads(pickle.dumps(shipped)).load.args == ("signs",)


def test_a_thread_that_cannot_write_leaves_no_traceback(capsys, monkeypatch):
    """As TensorBoard's, whose error its owner meets again; any other error of a thread is shown."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def main():
        for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("a fault")):
            thread = threading.Thread(target=raising, args=(error,))
            thread.start()
            thread.join()
        raise OSError(errno.ENOSPC, "No space left on device", "events.out")

    with pytest.raises(SystemExit) as end:
        command_line.run(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.splitlines()[-1].startswith("error: cannot write events.out (No space left on device)")
    assert said.count("Traceback") == 1 and "a fault" in said


def test_ctrl_c_in_a_destructor_counts(monkeypatch, capsys):
    """Python lets no exception out of there, so that Ctrl-C at such a moment would be lost."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    class Closing:
        def __del__(self):
            raise KeyboardInterrupt

    def main():
        thing = Closing()
        del thing
        time.sleep(10)
        pytest.fail("went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background are started without
    try:
        with pytest.raises(SystemExit) as end:
            command_line.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted: the same command goes on where this one stopped\n"


def raising(error):
    raise error
