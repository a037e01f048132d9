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
        "command": shlex.join(["python", *_relative(sys.argv)]),
        "versions": versions | {"python": platform.python_version()},
        "hardware": _hardware(),
    }


def _relative(arguments: list[str]) -> list[str]:
    """The script as it would be called from the folder above it: no path of this machine."""
    script = Path(arguments[0])
    return [f"{script.parent.name}/{script.name}" if script.suffix == ".py" else script.name, *arguments[1:]]


def _hardware() -> str:
    """The GPU where this process has used one, else the CPU."""
    import os

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
