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


@pytest.fixture(autouse=True, scope="session")
def known_steps():
    """Steps of the same activations are fitted once: most of the time of the hundreds of searches on the toy network."""
    from arq_env.quantization import convert

    fit, known = convert.activation_levels, {}

    def remembered(samples, bits, weights=None):
        content = [None if tensor is None else tensor.detach().cpu().numpy().tobytes() for tensor in (samples, weights)]
        if (key := (*content, bits)) not in known:
            known[key] = fit(samples, bits, weights)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "activation_levels", remembered)
        yield
