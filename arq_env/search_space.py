"""What a search may use of the environment, and nothing else."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from arq_env.bitwidths import BitWidthMap
from arq_env.budget import Budget
from arq_env.evaluation import CertifierSettings
from arq_env.layers import Layer
from arq_env.sensitivity import Sensitivities


class SearchSpace(Protocol):
    """The maps of one network, what they cost and what they are worth; :class:`arq_env.env.ArqEnv` is one.

    How a layer is quantized and a network certified stays behind it, so that a search runs on anything else that has these.
    """

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers of the network, in order."""

    @property
    def free_layers(self) -> tuple[Layer, ...]:
        """Those whose bits are chosen."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The bit-widths that they are chosen from, rising."""

    @property
    def horizon(self) -> int:
        """Steps of an episode: one a free layer."""

    @property
    def default_budget(self) -> Budget:
        """What a map may cost, and what it costs."""

    @property
    def budget(self) -> Budget:
        """That of the present episode."""

    @property
    def step_count(self) -> int:
        """Steps of the present episode so far."""

    @property
    def sensitivities(self) -> Sensitivities:
        """Place to the effect of 2, ..., 8 bits there, in nats; measured at first use."""

    @property
    def settings(self) -> CertifierSettings:
        """How the reward is measured."""

    def complete(self, chosen: BitWidthMap) -> BitWidthMap:
        """The map of these bits for the free layers and what the others are fixed at.

        Layers that read one tensor get the activation bits of the first.
        """

    def decode(self, actions: np.ndarray | Sequence) -> BitWidthMap:
        """The map that an episode of these actions ends with; it is within the default budget."""

    def encode(self, bit_widths: BitWidthMap) -> np.ndarray:
        """The actions of an episode at the present budget that ends with a map, or near it where they reach no further."""

    def judge(self, bit_widths: BitWidthMap) -> dict:
        """The info of a map, ``reward`` included; the budget is not checked.

        :raises ArqError: when it is not a map for this network
        """

    def reward_by(self, settings: CertifierSettings) -> Callable[[BitWidthMap], float]:
        """The reward as another certifier measures it, as a function of the map."""
