"""The scripts for a network of one's own or a shipped one; installed as ``arq_agents.commands``, for the command ``arq-env``."""
