"""What stable-baselines3 calls while an agent learns."""

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback

from .algorithms import DecayingNoise
from .recorder import SEARCH, Recorder

#: An action this close to -1 or 1 counts as being at the bounds.
AT_BOUNDS = 0.99


class RecordEpisodes(BaseCallback):
    """Hands each episode's outcome to the recorder.

    The reward is ``info["reward"]``, that of :meth:`arq_env.env.ArqEnv.judge`, also where a wrapper rewards the agent otherwise.

    :param recorder: of the search; its logger is the agent's
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder
        self._actions: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self._actions.append(self.locals["actions"][0])
        if self.locals["dones"][0]:
            self.recorder.add(self.locals["infos"][0])
            self.logger.record(f"{SEARCH}/actions_at_bounds", float((np.abs(self._actions) > AT_BOUNDS).mean()))
            self._actions.clear()
        return True


class ExplorationNoise(BaseCallback):
    """Gives a model that has no action noise the searches' own, from its first episode on: for rl_zoo3's configuration.

    rl_zoo3 builds every model of a sweep from one configuration, so that a noise in there would go on where the last model left it.
    """

    def _on_training_start(self) -> None:
        if self.model.action_noise is None:
            self.model.action_noise = DecayingNoise(spaces.flatdim(self.training_env.action_space))
            self.model.action_noise.reset()

    def _on_step(self) -> bool:
        return True
