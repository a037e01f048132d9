"""Find bit-width maps as optima of integer programs over sensitivities."""

from arq_agents import command_line, shared_options

options = command_line.start(__name__, shared_options.search_options, "integer_program")

from arq_agents.main import main

if __name__ == "__main__":
    command_line.run(main, options)
