"""What a result was made with: enough to redo it."""

import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import arq_env

PACKAGES = ("gymnasium", "numpy", "scipy", "stable-baselines3", "torch")
EXPORT_PACKAGES = ("numpy", "onnx", "onnxruntime", "qonnx", "torch")


def provenance(packages: tuple[str, ...] = PACKAGES) -> dict:
    """Command line, package versions, Python and processor of this process; of this package the version of the code that runs."""
    versions: dict[str, str | None] = {"arq-env": arq_env.__version__}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": shlex.join([*program(), *sys.argv[1:]]),
        "versions": versions | {"python": platform.python_version()},
        "hardware": _hardware(),
    }


def program() -> list[str]:
    """How this process was called, without its arguments and any path of this machine.

    A script as from the folder above it, such as ``["python", "experiments/export.py"]``, or ``["arq-env", "export"]``.
    """
    script, spec = Path(sys.argv[0]), getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.parent == "arq_agents.commands":
        return ["arq-env", script.stem.replace("_", "-")]
    return ["python", f"{script.parent.name}/{script.name}" if script.suffix == ".py" else script.name]


def _hardware() -> str:
    """The GPU where this process has used one, else the CPU."""
    import os

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
