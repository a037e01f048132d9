"""What setup.cfg cannot say.

The folder ``agents`` is installed as ``arq_agents``, since other libraries install ``agents``, and the scripts of ``experiments``,
without what lies in folders there, as ``arq_agents.commands``.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["arq_env*"]),
        *("arq_agents" + name[6:] for name in find_packages(include=["agents*"])),
        "arq_agents.commands",
    ],
    package_dir={"arq_agents": "agents", "arq_agents.commands": "experiments"},
)
