"""Let an agent that was trained for every budget choose maps elsewhere, for another noise, training or data, without learning.

For the agent's own environment it exports maps of further budgets.
"""

from pathlib import Path

from agents.any_budget import export_budgets, load_agent
from agents.main import add_environment, make_env
from arq_env import command_line


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("agent", type=Path, metavar="RUN", help="folder of train_any_budget.py")
    add_environment(parser, training="consistency", regained_bits=1)
    budgets = (0.005, 0.007, 0.009, 0.012, 1 / 64, 0.025)
    parser.add_argument("--budgets", type=float, nargs="+", default=budgets, help="budgets to export a map for")
    parser.add_argument("--output", type=Path, help="folder for the maps (default: below RUN, named by what it is applied to)")
    options = parser.parse_args()
    options.output = options.output or options.agent / f"applied-{options.env}-sigma{options.sigma:g}-{options.training}"
    return options


def main():
    options = parse()
    options.budget = max(options.budgets)
    agent, algorithm = load_agent(options.agent)
    print(export_budgets(agent, make_env(options), algorithm, options.budgets, options.output))


if __name__ == "__main__":
    command_line.run(main)
