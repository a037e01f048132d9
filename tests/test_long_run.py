"""A search of thousands of episodes: what it holds does not grow, and it is taken up again in little time."""

import gc
import os
import time

import pytest

from arq_agents.recorder import Recorder
from arq_agents.trace import read_trace
from arq_env.evaluation import Evaluation, Evaluator
from tests.toy import make_toy_env, outcome, search_toy

EPISODES, SETTLED = 2_000, 200


@pytest.mark.slow
def test_two_thousand_episodes(tmp_path, monkeypatch):
    """With a stub for the evaluation."""
    held, files = {}, {}
    real = Recorder.add

    def add(self, info):
        episode = real(self, info)
        if episode.episode in (SETTLED, EPISODES):
            gc.collect()
            held[episode.episode], files[episode.episode] = resident(), len(os.listdir("/proc/self/fd"))
        return episode

    def measure(self, build):
        return Evaluation(0.3 + 0.1 * (len(self._known) % 7) / 7, 0.8, 0.5, 0.0)

    monkeypatch.setattr(Recorder, "add", add)
    monkeypatch.setattr(Evaluator, "measure", measure)
    search_toy(tmp_path, "td3", EPISODES, make_toy_env(budget=0.02))
    assert held[EPISODES] < 1.05 * held[SETTLED], held
    assert files[EPISODES] <= files[SETTLED]
    whole = outcome(tmp_path)
    trace = tmp_path / "trace.jsonl"
    (tmp_path / "bit_widths.json").unlink()
    trace.write_bytes(b"".join(trace.read_bytes().splitlines(keepends=True)[:-1]))
    start = time.process_time()
    search_toy(tmp_path, "td3", EPISODES, make_toy_env(budget=0.02))
    assert time.process_time() - start < 240  # under 60 on a free core; what must not be is a square of the episodes
    assert outcome(tmp_path) == whole and len(read_trace(trace)) == EPISODES


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
