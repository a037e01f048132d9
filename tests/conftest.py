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
def done_once():
    """Steps of the same activations are fitted, and pictures of a search drawn, once: most of the time of a toy's search."""
    from arq_agents import recorder
    from arq_env.quantization import convert

    def once(function, key):
        known = {}

        def remembered(*arguments):
            if (at := key(*arguments)) not in known:
                known[at] = function(*arguments)
            return known[at]

        return remembered

    def content(samples, bits, weights=None):
        return bits, *(None if tensor is None else tensor.detach().cpu().numpy().tobytes() for tensor in (samples, weights))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "activation_levels", once(convert.activation_levels, content))
        patch.setattr(recorder, "render_rgb", once(recorder.render_rgb, lambda layers, *_: layers))
        patch.setattr(recorder, "render_pareto", once(recorder.render_pareto, lambda *_: None))
        yield
