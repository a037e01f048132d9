"""Search a bit-width map with stable-baselines3's SAC."""

from arq_agents import command_line

options = command_line.start(__name__, command_line.search_options, "sac")

from arq_agents.main import main

if __name__ == "__main__":
    command_line.run(main, options)
