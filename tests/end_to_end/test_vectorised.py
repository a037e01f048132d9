"""The page on scale's example of several episodes at once runs as it stands, but for its length."""

import re
import subprocess
import sys

import pytest

from tests.end_to_end.scripts import ROOT


@pytest.mark.slow
def test_the_example_of_several_episodes_at_once(tmp_path):
    (example,) = re.findall(r"```python\n(from stable_baselines3.*?)```", (ROOT / "docs/scale.md").read_text(), re.DOTALL)
    short, count = re.subn(r"\b[26]0 \* horizon", "2 * horizon", example)
    assert count == 2
    print_what_it_did = "    print(agent.num_timesteps, envs.num_envs, agent.replay_buffer.size())\n"
    (tmp_path / "example.py").write_text(short.replace("    envs.close()", print_what_it_did + "    envs.close()"))
    done = subprocess.run([sys.executable, tmp_path / "example.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["36", "2", "18"], done.stderr
