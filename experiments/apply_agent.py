"""Let an agent that was trained for every budget choose maps, without learning.

By default on what it learned on, for further budgets; with other options elsewhere, for another noise, training or data.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("agent", type=Path, metavar="RUN", help="folder of train_any_budget.py")
    shared_options.add_environment(parser)
    parser.set_defaults(env=None, sigma=None, training=None, regained_bits=None)  # those of the agent
    budgets = (0.005, 0.007, 0.009, 0.012, 1 / 64, 0.025)
    parser.add_argument("--budgets", type=float, nargs="+", default=budgets, help="budgets to export a map for")
    shared_options.add_engine(parser, "parts of evaluations")
    parser.add_argument("--output", type=Path, help="folder for the maps (default: below RUN, named by what it is applied to)")
    return parser.parse_args()


options = command_line.start(__name__, parse)

from arq_agents.any_budget import export_budgets, learned_on, load_agent
from arq_agents.main import engine_of, make_env
from arq_env import ArqError


def main(options):
    known = learned_on(options.agent)
    if options.env is None and not shared_options.own_arguments(options):  # else elsewhere
        given = {name: value for name in shared_options.IF_GIVEN if (value := getattr(options, name)) is not None}
        learned = known.get("problem", {})
        if any(getattr(options, name) not in (None, known.get(name)) for name in ("sigma", "training")):
            learned.pop("weights", None)  # which are of one noise and one network
        vars(options).update(learned | given)
    for name in ("env", "sigma", "training", "regained_bits"):
        if getattr(options, name) is None:
            if name not in known:
                option = name.replace("_", "-")
                raise ArqError(f"{options.agent}/config.json does not say what {option} the agent learned on: give --{option}")
            setattr(options, name, known[name])
    finer = f"-regained{options.regained_bits}" if options.regained_bits != known.get("regained_bits") else ""
    applied = f"applied-{options.env}{shared_options.label(options)}-sigma{options.sigma:g}-{options.training}{finer}"
    options.budget = max(options.budgets)
    env = make_env(options)
    agent, algorithm = load_agent(options.agent, env)
    with engine_of(options) as env.unwrapped.evaluator.engine:
        print(export_budgets(agent, env, algorithm, options.budgets, options.output or options.agent / applied))


if __name__ == "__main__":
    command_line.run(main, options)
