"""Search a bit-width map with stable-baselines3's DDPG; see --help."""

from agents.main import main
from arq_env import command_line

if __name__ == "__main__":
    command_line.run(lambda: main("ddpg"))
