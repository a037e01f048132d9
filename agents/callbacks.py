"""What stable-baselines3 calls while an agent learns."""

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from agents.recorder import Recorder

#: An action this close to -1 or 1 counts as being at the bounds.
AT_BOUNDS = 0.99


class RecordEpisodes(BaseCallback):
    """Hands each episode's outcome to the recorder.

    The reward is ``info["reward"]``, that of :meth:`arq_env.env.ArqEnv.judge`, also where a wrapper rewards the agent otherwise.

    :param recorder: of the search; its logger is the agent's
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder, self._actions = recorder, []

    def _on_step(self) -> bool:
        self._actions.append(self.locals["actions"][0])
        if self.locals["dones"][0]:
            self.recorder.add(self.locals["infos"][0])
            self.logger.record("arq/actions_at_bounds", float((np.abs(self._actions) > AT_BOUNDS).mean()))
            self._actions.clear()
        return True
