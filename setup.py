"""What setup.cfg cannot say: the folder ``agents`` is installed as ``arq_agents``, since other libraries install ``agents``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["arq_env*"]), *("arq_agents" + name[6:] for name in find_packages(include=["agents*"]))],
    package_dir={"arq_agents": "agents"},
)
