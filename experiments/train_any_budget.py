"""Train one agent for every budget between two, then export a map for each budget asked for from that one agent.

The budget of each episode is drawn at random; the observation holds it. Stop it at any time: the same command goes on.
"""

from pathlib import Path

from arq_agents import command_line, shared_options


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--algorithm", default="td3", help="of stable-baselines3, and levers, such as td3+features+demonstrations")
    shared_options.add_environment(parser, training="consistency", regained_bits=1)
    parser.add_argument("--episodes", type=shared_options.whole(1), default=400, help="maps to try")
    parser.add_argument("--low", type=float, default=0.005, help="smallest budget, as a fraction of FP32's bit operations")
    parser.add_argument("--high", type=float, default=0.03, help="largest budget")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        help="budgets to export a map for, within those two (default: eight, evenly spaced on a log scale)",
    )
    parser.add_argument("--seed", type=shared_options.whole(0), default=0, help="of the agent")
    parser.add_argument("--output", type=Path, default=Path("runs/any-budget"), help="run folder")
    shared_options.add_engine(parser, "parts of evaluations")
    options = parser.parse_args()
    if not 0 < options.low < options.high <= 1:
        parser.error(f"budgets from {options.low} to {options.high} were asked for: give two fractions in (0, 1], --low first")
    outside = [budget for budget in options.budgets or () if not options.low <= budget <= options.high]
    if outside:
        parser.error(f"the agent learns on budgets from {options.low} to {options.high}, and {outside[0]} is not: change either")
    return options


options = command_line.start(__name__, parse)

import numpy as np

from arq_agents.any_budget import export_budgets, train_for_any_budget
from arq_agents.main import engine_of, make_env


def main(options):
    if options.budgets is None:
        even = np.geomspace(options.low, options.high, 8)
        options.budgets = [min(max(float(f"{budget:.2g}"), options.low), options.high) for budget in even]
    options.budget = options.high
    env = make_env(options)
    with engine_of(options) as env.unwrapped.evaluator.engine:
        agent = train_for_any_budget(
            options.algorithm,
            env,
            (options.low, options.high),
            episodes=options.episodes,
            folder=options.output,
            seed=options.seed,
            config={"env": options.env, "training": options.training},
        )
        print(export_budgets(agent, env, options.algorithm, options.budgets, options.output))


if __name__ == "__main__":
    command_line.run(main, options)
