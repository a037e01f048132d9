"""The command ``arq-env``: the scripts of ``experiments/`` by name, where there is no clone to run them from."""

import ast
import runpy
import sys
from importlib import metadata, resources

from . import command_line

#: Where they are installed.
PACKAGE = "arq_agents.commands"
#: In the order in which they are used.
COMMANDS = (
    "pretrain",
    "solve_integer_program",
    "train_td3",
    "train_sac",
    "train_ddpg",
    "train_any_budget",
    "train_any_bits",
    "apply_agent",
    "finalize",
    "certify_map",
    "export",
    "certify",
    "report",
    "validate",
)


def main() -> None:
    """Run the script that the first argument names, with the others, as Python runs it from a clone."""
    parser = command_line.OneLineParser(
        prog="arq-env",
        description="Search a bit-width map, make the network that it stands for, certify and export it. "
        "arq-env COMMAND --help shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=metadata.version("arq-env"))
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name in COMMANDS:
        commands.add_parser(name.replace("_", "-"), help=_summary(name), add_help=False)
    command = parser.parse_args(sys.argv[1:2]).command
    del sys.argv[1]
    runpy.run_module(f"{PACKAGE}.{command.replace('-', '_')}", run_name="__main__", alter_sys=True)


def _summary(name: str) -> str:
    """The first line of a script's docstring, without running the script."""
    source = resources.files(PACKAGE).joinpath(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
