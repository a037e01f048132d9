"""Off-the-shelf stable-baselines3 agents for the environments of ``arq_env``, and what a search leaves behind."""
