"""The Markov decision process: one step a layer, the certifier's verdict at the end."""

import dataclasses
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, bops_fraction, complete, fixed_layers, free_layers, widths_of
from arq_env.budget import Budget, BudgetSpec, make_budget
from arq_env.evaluation import CertifierSettings, Evaluator
from arq_env.observation import FEATURES, observe, static_features
from arq_env.problem import Problem, load_problem
from arq_env.rewards import settings_for
from arq_env.sensitivity import Sensitivities
from arq_env.support.errors import ArqError
from arq_env.support.render import render_ansi, render_rgb

#: Bits that an action of 1 adds to an even share. What a layer saves raises the even share of all later ones, so that
#: unequal maps stay within reach, while random actions stay where good maps are.
REACH = 1
#: Reward per unit of relative ACR: losing all of FP32's ACR gives -10.
REWARD_SCALE = 10.0
#: Characters of a device's name.
LONGEST_NAME = 64


class ArqEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Choose the bit-widths of a network, layer by layer, so that its certified robustness survives.

    ## Description
    A network trained under Gaussian noise is quantized to mixed precision within a budget of bit operations (BOPs, the sum over
    layers of MACs x weight bits x activation bits). An episode walks the layers from input to output; those that are fixed, by
    default the first and the last at 8 bits, are passed over. After the last step the network is quantized, BatchNorm's
    statistics are estimated anew, and its radii under randomized smoothing are measured on images held out for the reward. A
    reconstruction of the decision process of ARQ (arXiv 2410.24214) and of HAQ (arXiv 1811.08886), which it builds on.

    ## Observation Space
    `Box(0, 1, (15,), float32)`: features of the layer whose bits are next, those of a fixed size scaled over the layers.

    | index | feature                  | why it is there                                                       |
    | ----- | ------------------------ | --------------------------------------------------------------------- |
    | 0     | position                 | early layers see noise first, late ones carry the class               |
    | 1, 2  | depthwise, linear        | kinds of layers stand coarse bits differently                         |
    | 3, 4  | input, output channels   | wide layers average quantization errors out (log scale)               |
    | 5, 6  | kernel elements, stride  | stride 2 layers lose information that nothing downstream restores     |
    | 7     | parameters               | the size of what weight bits act on (log scale)                       |
    | 8     | input positions          | the size of what activation bits act on (log scale)                   |
    | 9     | MACs                     | what a bit costs here (log scale)                                     |
    | 10    | share of MACs left       | how much is still to be paid for (of what the budget charges for)     |
    | 11    | budget                   | even share of this episode's budget, sqrt(bits x bits) / 8            |
    | 12    | budget left              | even share of what is left: without it the process is not Markov      |
    | 13, 14| previous weight and activation bits / 8 | errors of neighbouring layers add up                   |

    ## Action Space
    `Box(-1, 1, (2,), float32)`: weight and activation bits of this layer, relative to what the rest of the budget affords. 0 is
    an even share, the bits that all remaining layers could have alike; -1 and 1 are 1 bit fewer and more, or the next of
    `bits`, where not all of 2..8 are there. The result is rounded to one of them, and lowered until all later layers can still
    have the fewest, so that every map that leaves the environment is within its budget. Layers that read the same tensor share
    its activation bits: the first of them decides, and the others choose weight bits only. Where bits of a kind cost nothing,
    as those of activations in bytes, their even share is 8 (the most there are), so that actions take none or one of them off.

    ## Rewards
    0 until the last step, then 10 (ACR / reference ACR - 1), with the FP32 network's ACR under the same
    certifier and the same noise as the reference: 0 is "as good as FP32", 2 bits everywhere is clearly negative.

    `reward_method` chooses how the ACR is measured. `"soft"`, the default, is for a search: the radius of the soft smoothed
    classifier, estimated from the mean softmax of few samples, hardly any of which are noise to a comparison of maps
    (`experiments/studies/rank_maps.py`). Its logits are first scaled to the mean entropy of FP32's, since that radius also grows
    with mere confidence. The others count labels and certify: `"cohen"`, and `"randomized"`, which spends alpha to the
    last; `"sequential"` for large n (1,000 and more), where it draws a fraction of the samples for nearly the same ACR.
    `"incremental"` is the reward of the published ARQ, for comparison with it: it charges every disagreement with FP32, also
    harmless ones, so it punishes maps whose robustness is unchanged. `"paired"` charges the harmful ones only. Measured from 8
    to 4 bits, where 3% to 10% of the predictions change (`experiments/benchmarks/methods.py`), `"paired"` is ahead of `"cohen"`
    up to 800 to 350 samples an image and behind above, `"incremental"` about half as far.

    ## Starting State
    The first layer that is not fixed, nothing spent. `reset(options={"budget": f})` sets the budget for one episode, of the kind
    that the environment has.

    ## Episode End
    Terminates after the last free layer (18 steps for ResNet-20); never truncates. The last step's `info` holds
    `reward`, `bit_widths` (name to (weight, activation)), `bits` (the same as an int64 array [layers, 2], which vector
    environments stack), `bops_fraction`, `acr`, `clean_accuracy`, `certified_accuracy` (at radius sigma / 2), `reference_acr` and
    `evaluation_seconds`, and what the map costs in each other kind of budget that is set (`bytes`, `latency`). Maps are evaluated
    once; a map met again costs nothing and reports the time that its evaluation took.

    The spec has no `max_episode_steps`, since the horizon is the network's: what needs one, such as Gymnasium's
    `TimeAwareObservation`, gets it as `gym.make(..., max_episode_steps=18)`; `env.unwrapped.horizon` says how many.

    ## Arguments
    `gym.make("ARQ-ResNet20-v0", sigma=0.5, training="gaussian", budget=0.015625, device="cpu")`, `render_mode`
    (`"ansi"`, `"rgb_array"`, or `"human"`, which is Gymnasium's `HumanRendering` and needs pygame), and the reward certifier's
    `images`, `n0`, `n`, `alpha`, `seed`, `reward_method` and `regained_bits` (see
    :class:`arq_env.rewards.CertifierSettings`). `budget` is a fraction of FP32's bit operations, or limits by kind that hold
    together: `{"bops": 0.01, "bytes": 120_000, "latency": {"milliseconds": 3.5, "table": "times.json"}}`, see
    :mod:`arq_env.budget`. `fix={"first": "8/8", "last": "8/8", "head.*": "4/8"}` says which layers are fixed and at which
    weight and activation bits, `bits=[2, 4, 8]` which bit-widths there are (:func:`arq_env.bitwidths.restrict`).

    `gym.make("ARQ-Custom-v0", network="mymodels:make_net", checkpoint="net.pth", data="photos/", sigma=0.25)` is a network of one's
    own, see :func:`arq_env.problem.load_problem`. The class itself takes a :class:`arq_env.problem.Problem`, which holds any
    network of convolutions and linear layers.

    ## Version History
    * v0: the reward of the first release. Until then it changes with the package (`CHANGELOG.md`; `reward_version` in run folders);
      from then on a change of reward, observation, action or quantizer raises the id.
    """

    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 4}

    def __init__(
        self,
        problem: Problem,
        *,
        budget: BudgetSpec = 1 / 64,
        settings: CertifierSettings | None = None,
        render_mode: str | None = None,
    ):
        if not (render_mode is None or isinstance(render_mode, str) and render_mode in self.metadata["render_modes"]):
            raise ArqError(f"there is no render mode {render_mode!r}: choose one of {', '.join(self.metadata['render_modes'])}")
        self.problem, self.render_mode = problem, render_mode
        self.evaluator = Evaluator(problem, settings_for(problem) if settings is None else settings)
        self.layers = problem.layers
        self.free_layers = free_layers(self.layers)
        self.widths = widths_of(self.layers)
        self.default_budget = make_budget(budget, problem)
        self._static = static_features(self.free_layers)
        self.observation_space = spaces.Box(0, 1, (len(FEATURES),), np.float32)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self._start(self.default_budget)

    @property
    def horizon(self) -> int:
        """Steps of an episode: one a free layer."""
        return len(self.free_layers)

    @property
    def step_count(self) -> int:
        """Steps of this episode so far."""
        return len(self._chosen)

    def _start(self, budget: Budget) -> None:
        self.budget = budget
        self._chosen: dict[str, Bits] = {}
        position = self.layers.index(self.free_layers[0])
        before = self.complete({})[self.layers[position - 1].name]
        self._previous = before if position else Bits(MAX_BITS, MAX_BITS)  # nothing comes before, and images have 8 bits

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; ``options={"budget": f}`` sets its budget, in what the environment's is measured in."""
        super().reset(seed=seed)
        budget = budget_option(options)
        self._start(self.default_budget if budget is None else self.default_budget.at(budget))
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Give the current layer its bits; the last step quantizes and certifies."""
        step = self.step_count
        if step == self.horizon:
            raise gymnasium.error.ResetNeeded("the episode is over: call reset() before the next step")
        layer = self.free_layers[step]
        self._chosen[layer.name] = self._previous = next_bits(action, self.budget, self._chosen)
        if step + 1 < self.horizon:
            return self._observe(), 0.0, False, False, {}
        info = self.judge(self.complete(self._chosen))
        return self._observe(), info["reward"], True, False, info

    def complete(self, chosen: BitWidthMap) -> BitWidthMap:
        """The map of these bits for the free layers, as :func:`arq_env.bitwidths.complete` makes it."""
        return complete(chosen, self.layers)

    def decode(self, actions: np.ndarray | Sequence) -> BitWidthMap:
        """The map that an episode of these actions ends with, at the environment's own budget: for searches that plan it whole.

        :param actions: [free layers, 2], each as for :meth:`step`
        """
        chosen: BitWidthMap = {}
        if len(actions) != self.horizon:
            raise ArqError(f"{len(actions)} actions were given: give one for each of the {self.horizon} free layers")
        for layer, action in zip(self.free_layers, actions, strict=True):
            chosen[layer.name] = next_bits(action, self.default_budget, chosen)
        return self.complete(chosen)

    def encode(self, bit_widths: BitWidthMap) -> np.ndarray:
        """The actions of an episode at the present budget that ends with a map, or near it where they reach no further.

        :return: float32 [free layers, 2], each as for :meth:`step`
        """
        chosen: BitWidthMap = {}
        actions: list[np.ndarray] = []
        for layer in self.free_layers:
            wanted, even = (_places(pair, self.widths) for pair in (bit_widths[layer.name], self.budget.even_bits(chosen)))
            action = (wanted - even) / REACH
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            chosen[layer.name] = next_bits(actions[-1], self.budget, chosen)
        return np.stack(actions)

    def judge(self, bit_widths: BitWidthMap) -> dict:
        """The info of a whole map, as the last step gives it, ``reward`` included; the budget is not checked.

        :raises ArqError: when it is not a map for this network
        """
        reference = self.evaluator.reference
        evaluation = self.evaluator.evaluate(bit_widths)
        return {
            "reward": REWARD_SCALE * (evaluation.acr / reference.acr - 1),
            "bit_widths": {name: tuple(bits) for name, bits in bit_widths.items()},
            "bits": np.array([bit_widths[layer.name] for layer in self.layers], np.int64),
            "bops_fraction": bops_fraction(bit_widths, self.layers),
            "acr": evaluation.acr,
            "clean_accuracy": evaluation.clean_accuracy,
            "certified_accuracy": evaluation.certified_accuracy,
            "reference_acr": reference.acr,
            "evaluation_seconds": evaluation.seconds,
            **{part.name: part.amount(bit_widths) for part in self.default_budget.parts if part.name != "bops"},
        }

    @property
    def sensitivities(self) -> Sensitivities:
        """What few bits cost in each place, see :attr:`arq_env.evaluation.Evaluator.sensitivities`."""
        return self.evaluator.sensitivities

    @property
    def settings(self) -> CertifierSettings:
        """Of the reward certifier."""
        return self.evaluator.settings

    def reward_by(self, settings: CertifierSettings) -> Callable[[BitWidthMap], float]:
        """The reward as another certifier measures it, with the same calibration: a function of the map, which judges each once."""
        evaluator = Evaluator(self.problem, settings, quantizer=self.evaluator.quantizer)
        return lambda bit_widths: REWARD_SCALE * (evaluator.evaluate(bit_widths).acr / evaluator.reference.acr - 1)

    def _observe(self) -> np.ndarray:
        return observe(self._static, self.budget, self._chosen, self._previous)

    def render(self) -> Any:
        """The bits chosen so far: text (``ansi``) or a bar chart as uint8 [h, w, 3] (``rgb_array``)."""
        fixed = fixed_layers(self.layers)
        if self.render_mode == "ansi":
            return render_ansi(self.layers, fixed | self._chosen)
        if self.render_mode == "rgb_array":
            title = f"layer {self.step_count} of {self.horizon}, budget {self.budget}"
            return render_rgb(self.layers, fixed | self._chosen, title)
        gymnasium.logger.warn("render() was called without a render_mode: pass one to gym.make")
        return None


def next_bits(action: Any, budget: Budget, chosen: BitWidthMap) -> Bits:
    """What an action means for the next layer: bits relative to an even share of what is left, made to fit.

    :param action: two numbers in [-1, 1], for weight and activation; what is outside is clipped
    :param chosen: the bits of the free layers before it
    """
    try:
        pair = np.asarray(action)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors with gradients
        raise ArqError(f"the action cannot be read ({error}): give two finite numbers in [-1, 1]") from error
    if pair.shape != (2,) or pair.dtype.kind not in "iuf" or not np.isfinite(pair).all():
        raise ArqError(f"the action is {action!r}: give two finite numbers in [-1, 1]")
    widths, shares = budget.widths, zip(_places(budget.even_bits(chosen), budget.widths).tolist(), pair.tolist(), strict=True)
    places = (math.floor(even + REACH * min(max(a, -1.0), 1.0) + 0.5) - widths[0] for even, a in shares)
    return budget.fit(Bits(*(widths[min(max(place, 0), len(widths) - 1)] for place in places)), chosen)


def _places(bits: Sequence[float], widths: tuple[int, ...]) -> np.ndarray:
    """Where numbers of bits lie among the bit-widths there are, counted from the fewest: themselves where none is left out."""
    return np.interp(bits, widths, widths[0] + np.arange(len(widths)))


def budget_option(options: Any) -> Any:
    """The budget that ``reset(options=)`` asks for, unchecked; None where it asks for none.

    :raises ArqError: for another option, or when ``options`` is no dictionary
    """
    if not (options is None or isinstance(options, Mapping)):
        raise ArqError(f"the reset options are {options!r}: give a dictionary, such as {{'budget': 0.01}}")
    for name in options or {}:
        if name != "budget":
            raise ArqError(f"there is no reset option {name!r}: the one option is 'budget'")
    return (options or {}).get("budget")


def arq_env_of(env: gymnasium.Env) -> ArqEnv:
    """The environment inside its wrappers.

    :raises ArqError: when it is none of this package
    """
    if not isinstance(env.unwrapped, ArqEnv):
        raise ArqError(f"the environment is {env.unwrapped}: give one of this package, wrapped or not")
    return env.unwrapped


def make_env(
    network: str | None = None,
    data: str | None = None,
    sigma: float = 0.5,
    training: str = "gaussian",
    checkpoint: str | None = None,
    normalize: Sequence[Sequence[float]] | None = None,
    keep: Sequence[str] = (),
    network_arguments: dict | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    reward_images: int | None = None,
    budget: BudgetSpec = 1 / 64,
    fix: Mapping[str, str] | None = None,
    bits: Sequence[int] | None = None,
    weights: str | None = None,
    device: str = "cpu",
    render_mode: str | None = None,
    **settings: Any,
) -> gymnasium.Env:
    """What ``gym.make`` calls: the environment of a network and its data; every argument can be written as JSON.

    :param network, data, sigma, training, checkpoint, normalize, keep: as for :func:`arq_env.problem.load_problem`
    :param network_arguments, image_size, flip, reward_images, fix, bits, weights, device: likewise
    :param render_mode: as for :class:`ArqEnv`, or "human" for Gymnasium's window around it
    :param settings: fields of :class:`arq_env.rewards.CertifierSettings`; for data of one's own the defaults are those of
        :func:`arq_env.rewards.settings_for`
    :raises ArqError: for an unknown argument or one out of range, a missing checkpoint or a budget that cannot be met
    """
    known = [field.name for field in dataclasses.fields(CertifierSettings)]
    for name in settings:
        if name not in known:
            others = [other for other in inspect.signature(make_env).parameters if other != "settings"]
            raise ArqError(f"there is no argument {name!r}: choose of {', '.join((*others, *known))}")
    for name, value in (("network", network), ("data", data)):
        if value is None:
            raise ArqError(f"{name} is None: give it by name, path or as module:function")
    if not (isinstance(device, str) and len(device) <= LONGEST_NAME):
        raise ArqError(f"device is {device!r}: give a name of at most {LONGEST_NAME} characters")
    if isinstance(sigma, bool) or not (isinstance(sigma, numbers.Real) and 0 < sigma < 1e6):
        raise ArqError(f"sigma is {sigma!r}: give a positive standard deviation, in units of pixels in [0, 1]")
    certifier, human = CertifierSettings(**settings), isinstance(render_mode, str) and render_mode == "human"
    problem = load_problem(
        network,
        data,
        sigma=float(sigma),
        training=training,
        checkpoint=checkpoint,
        normalize=normalize,
        keep=keep,
        network_arguments=network_arguments,
        image_size=image_size,
        flip=flip,
        reward_images=reward_images,
        fix=fix,
        bits=bits,
        weights=weights,
        device=device,
    )
    if "arguments" in problem.card:
        certifier = settings_for(problem, **settings)
    render_mode = "rgb_array" if human else render_mode
    env = ArqEnv(problem, budget=budget, settings=certifier, render_mode=render_mode)
    return gymnasium.wrappers.HumanRendering(env) if human else env
