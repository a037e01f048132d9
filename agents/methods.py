"""The searches by name, and what can be added to them: ``td3+features+demonstrations+exchange`` is TD3 with all three.

Names and numbers only, so that a command line that shows them imports no torch. What the levers are says :mod:`arq_agents.levers`.
"""

from arq_env.support.errors import ArqError

#: stable-baselines3's algorithms.
LEARNERS = ("ddpg", "td3", "sac")
#: All that learn: these and the published search, as rebuilt in :mod:`arq_agents.haq`.
AGENTS = (*LEARNERS, "arq")
#: Those that do not learn.
SEARCHES = ("uniform", "random", "greedy", "integer_program", "evolution", "parzen")
WITH_OPTUNA = ("evolution", "parzen")
#: Those that propose the same maps whatever their rewards are.
PLANNED = ("uniform", "random", "integer_program")
#: Those that start from sensitivities, which take :func:`arq_env.sensitivity.forward_passes`.
WITH_SENSITIVITIES = ("greedy", "integer_program")

#: What :func:`arq_agents.algorithms.build_agent` is told to do otherwise.
CHANGES: dict[str, dict[str, float]] = {
    "demonstrations": {"warm_up": 0},
    "onestep": {"n_steps": 1},
    "onegradient": {"gradient_steps": 1},
    "steadynoise": {"noise_decay": 1.0},
}
#: Those that need sensitivities, and all.
INFORMED = ("features", "demonstrations", "exchange")
LEVERS = tuple(dict.fromkeys(("onehot", *INFORMED, *CHANGES, "unscaled", "incremental")))

#: Episodes of a search by default.
EPISODES = 150

#: What is compared by default.
COMPARED = (
    *SEARCHES,
    "integer_program+exchange",
    "arq",
    *LEARNERS,
    "sac+exchange",
    *(f"{agent}+features+demonstrations+exchange" for agent in ("td3", "sac")),
)


def split_method(method: str) -> tuple[str, tuple[str, ...]]:
    """The search and the levers of a method such as ``td3+features``.

    :raises ArqError: for an unknown search or lever, and for a lever that this search cannot have
    """
    name, *levers = method.split("+")
    if name not in (*AGENTS, *SEARCHES):
        raise ArqError(f"there is no search {name!r}: choose of {', '.join((*SEARCHES, *AGENTS))}")
    for lever in levers:
        if lever not in LEVERS:
            raise ArqError(f"there is nothing called {lever!r} to add to {name}: choose of {', '.join(LEVERS)}")
        able = [other for other in LEARNERS if lever != "steadynoise" or other != "sac"]  # SAC's own policy is random
        if lever != "exchange" and name not in able:
            raise ArqError(f"{lever} cannot be added to {name}: only to {', '.join(able)}")
    return name, tuple(levers)


def uses_sensitivities(method: str) -> bool:
    """Whether a search measures the effect of few bits in each place before its first map."""
    name, levers = split_method(method)
    return name in WITH_SENSITIVITIES or not {*levers}.isdisjoint(INFORMED)
