"""Search a bit-width map with stable-baselines3's DDPG."""

from arq_agents import command_line, shared_options

options = command_line.start(__name__, shared_options.search_options, "ddpg")

from arq_agents.main import main

if __name__ == "__main__":
    command_line.run(main, options)
