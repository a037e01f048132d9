"""Train one agent for every budget between two, then export a map for each budget asked for from that one agent.

The budget of each episode is drawn at random; the observation holds it. Stop it at any time: the same command goes on.
"""

from pathlib import Path

import gymnasium

from agents.algorithms import ALGORITHMS
from agents.any_budget import map_for_budget, train_for_any_budget
from agents.run_folder import export_map
from arq_env import command_line
from arq_env.bitwidths import Bits
from arq_env.files import write_json
from arq_env.provenance import provenance


def parse():
    parser = command_line.parser(__doc__)
    parser.add_argument("--algorithm", choices=list(ALGORITHMS), default="td3", help="of stable-baselines3")
    parser.add_argument("--env", default="ARQ-ResNet20-v0", help="environment id")
    parser.add_argument("--episodes", type=command_line.whole(1), default=400, help="maps to try, the first 20 at random")
    parser.add_argument("--low", type=float, default=0.005, help="smallest budget, as a fraction of FP32's bit operations")
    parser.add_argument("--high", type=float, default=0.03, help="largest budget")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.005, 0.006, 0.007, 0.009, 0.012, 1 / 64, 0.02, 0.03],
        help="budgets to export a map for",
    )
    parser.add_argument("--sigma", type=float, default=0.5, help="smoothing noise; a checkpoint trained under it must be there")
    parser.add_argument("--training", default="consistency", help="how that checkpoint was trained: gaussian or consistency")
    parser.add_argument("--seed", type=command_line.whole(0), default=0, help="of the agent")
    parser.add_argument("--device", default="cpu", help="of the network that is certified; the agent stays on the CPU")
    parser.add_argument("--output", type=Path, default=Path("runs/any-budget"), help="run folder")
    return parser.parse_args()


def main():
    options = parse()
    problem = {name: getattr(options, name) for name in ("sigma", "training", "device")}
    env = gymnasium.make(options.env, disable_env_checker=True, budget=options.high, **problem)
    agent = train_for_any_budget(
        options.algorithm,
        env,
        (options.low, options.high),
        episodes=options.episodes,
        folder=options.output,
        seed=options.seed,
        config={"env": options.env, "device": options.device},
    )
    print("  budget     BOPs   reward")
    rows = []
    for budget in options.budgets:
        reward, info = map_for_budget(agent, env, budget)
        metrics = {"reward": reward} | {key: info[key] for key in ("acr", "clean_accuracy", "certified_accuracy", "reference_acr")}
        bit_widths = {name: Bits(*bits) for name, bits in info["bit_widths"].items()}
        export_map(options.output / "maps" / f"{budget:g}", env, bit_widths, budget, metrics)
        rows.append({"budget": budget, "bops_fraction": info["bops_fraction"]} | metrics)
        print(f"{budget:8.3%} {info['bops_fraction']:8.3%} {reward:8.3f}")
    write_json(options.output / "budgets.json", {"rows": rows, "provenance": provenance()})


if __name__ == "__main__":
    command_line.run(main)
