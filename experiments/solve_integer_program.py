"""Find bit-width maps as optima of integer programs over measured sensitivities; see --help."""

from agents.main import main
from arq_env import command_line

if __name__ == "__main__":
    command_line.run(lambda: main("integer_program"))
