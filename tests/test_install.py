"""What is installed owns no name that another library installs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_holds_two_packages_with_their_data(tmp_path):
    left_out = shutil.ignore_patterns(".*", "results", "tests", "build", "runs", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)  # a build leaves folders behind
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tmp_path / "source"]
    subprocess.run(wheel, check=True)
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"arq_env", "arq_agents"}
    sources = {f"arq_agents/{path.relative_to(ROOT / 'agents')}" for path in (ROOT / "agents").rglob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "arq_env").rglob("*.py")}
    assert sources <= set(names)
    weights = {f"arq_env/networks/weights/{path.name}" for path in (ROOT / "arq_env/networks/weights").iterdir()}
    assert weights | {"arq_env/report/page.html.j2", "arq_env/py.typed", "arq_agents/py.typed"} <= set(names)
    scripts = {f"arq_agents/commands/{path.name}" for path in (ROOT / "experiments").glob("*.py")}
    assert scripts == {name for name in names if name.startswith("arq_agents/commands/")}
