import runpy
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from tests.end_to_end.scripts import path_of


@pytest.fixture
def called(monkeypatch, capsys):
    """As :func:`tests.end_to_end.scripts.script`, in this process: for what ends at once, it spares seconds of imports."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # a script sets its own
        monkeypatch.setattr(threading, "excepthook", threading.excepthook)
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
        code, handler = 0, signal.getsignal(signal.SIGINT)
        try:
            runpy.run_path(str(path_of(name)), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
        return subprocess.CompletedProcess(name, code, *capsys.readouterr())

    return call
