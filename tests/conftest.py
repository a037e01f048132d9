import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a worker a core, and threads that wait by spinning; scripts that are run inherit it

import gymnasium
import hypothesis
import pytest

import arq_env  # noqa: F401  (registers the ids)

hypothesis.settings.register_profile("thorough")  # see tests/hostile.py
gymnasium.register("ARQ-Toy-v0", entry_point="tests.toy:make_toy_env")


@pytest.fixture
def toy_env():
    from tests.toy import make_toy_env

    return make_toy_env()


@pytest.fixture
def problem():
    from tests.toy import toy_problem

    return toy_problem()
