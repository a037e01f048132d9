"""How far few bits drive a network's predictions from FP32's: in one place, for searches that add these up, and of a whole map."""

import builtins
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, free_layers, uniform
from arq_env.layers import Layer
from arq_env.networks.checkpoints import copy_network
from arq_env.problem import Problem
from arq_env.quantization import Quantizer
from arq_env.quantization.exact import exact_means
from arq_env.support.batches import batch_size
from arq_env.support.errors import ArqError, reason

#: A new number wherever the same network would get other sensitivities, so that what stands on them is not mixed (1: a divergence
#: measured for each; 2: to second order).
SENSITIVITY_VERSION = 2
#: Bit-widths whose effect is found; from the last of them on a bit more is taken to divide it by four, as it does the power of the
#: quantization noise.
WITH_EFFECT = (2, 3, 4)
#: Noisy images that predictions are looked at on.
IMAGES = 512
#: So many of them at a time for a gradient: a prime, by which they are told from positions.
BATCH = 31
#: Values of a channel below which a shift and a scale are not taken out of them, for they would be most of what there is.
LEAST_VALUES = 24

#: What can get bits of its own: layer name, and "weight" or "activation".
Place = tuple[str, str]
#: Place to the effect of MIN_BITS, ..., MAX_BITS there.
Sensitivities = dict[Place, list[float]]


class Divergence:
    """Mean KL divergence, in nats, of the FP32 network's predictions from a quantized network's, under noise.

    Measured on noisy training images with BatchNorm estimated anew, as in the reward's evaluation. One forward pass for each of
    few images ranks maps, since it weighs every change of a prediction where a certificate only counts changed labels.

    :param quantizer: of the problem's network, calibrated
    :param seed: of images and noise
    """

    def __init__(self, problem: Problem, quantizer: Quantizer, seed: int = 0):
        self.quantizer = quantizer
        self._images = problem.calibration_images(seed + 1, IMAGES)
        self._target = _log_probabilities(problem.network, self._images)

    def __call__(self, bit_widths: BitWidthMap) -> float:
        """The divergence of a whole map."""
        with exact_means():
            got = _log_probabilities(self.quantizer.quantize(bit_widths), self._images)
        return F.kl_div(got, self._target, reduction="batchmean", log_target=True).item()


@torch.inference_mode()
def _log_probabilities(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.log_softmax(network(part), 1) for part in images.split(batch_size(images[0].numel(), 32))])


class SecondOrder:
    """The divergence that few bits cause in each place alone, to second order: from one gradient for all places.

    Rounding adds an error e to what a layer gives. Where it is small, the KL divergence is half the mean of (g . e)^2, with g the
    gradient of log p(y) there and y drawn from the network's own predictions: the Fisher information, as in FIT (Zandonati et al.,
    arXiv 2210.08502), here of an image's whole error. What of e is a shift or a scale of a channel does not pass a BatchNorm that
    reads it, since its statistics are estimated anew under quantization.

    A call is for one part of the images, so that an engine can make them beside each other. Its last places differ between kinds of
    processors, not between numbers of workers.

    :param quantizer: of the problem's network, calibrated
    :param seed: of images, noise and labels
    :raises ArqError: by a call, when no gradient can be taken, or naming a layer in whose output images cannot be told apart
    """

    def __init__(self, problem: Problem, quantizer: Quantizer, seed: int = 0):
        self.layers, self.seed = problem.layers, seed
        self.network = copy_network(quantizer.unrounded).requires_grad_(False)
        self.images = problem.calibration_images(seed + 1, IMAGES)
        self.quantized = [quantizer.convert(uniform(self.layers, bits, bits)) for bits in WITH_EFFECT]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The images of each call."""
        return self.images.split(batch_size(4 * self.images[0].numel(), BATCH))  # a gradient keeps all that it came through

    def __call__(self, part: int) -> np.ndarray:
        """Sum over a part's images, in nats: float64 [places, bit-widths with an effect]."""
        images = self.parts[part]
        changes = {place: torch.zeros(len(WITH_EFFECT), len(images)) for place in places(self.layers)}
        decides = {layer.name: layer.tied_to or layer.name for layer in self.layers}
        for call in self._calls(images, torch.Generator().manual_seed(self.seed * 1_000_003 + part)):
            for i, network in enumerate(self.quantized):
                of_weight, of_activation = call.changes(self.network.get_submodule(call.name), network.get_submodule(call.name))
                for place, change in (((call.name, "weight"), of_weight), ((decides[call.name], "activation"), of_activation)):
                    if place in changes:
                        changes[place][i] += change.cpu()
        return np.array([(change.double().square().sum(1) / 2).tolist() for change in changes.values()])

    def _calls(self, images: torch.Tensor, generator: torch.Generator) -> "list[_Call]":
        """Each call of a layer to be quantized, on noisy images, with the gradient of a drawn label's log-probability."""
        made: list[_Call] = []
        given: dict[int, _Call] = {}

        def note(name: str) -> Callable:
            def hook(module: Any, inputs: tuple, keywords: dict, output: torch.Tensor) -> torch.Tensor:
                input, *more = inputs or (keywords["input"],)
                copied = input.detach().to(module.weight.dtype, copy=True)  # what follows may work in place
                there = output if output.requires_grad else output.detach().requires_grad_()
                made.append(_Call(name, len(images), copied, tuple(more), there, []))
                on = there.clone()
                given[id(on)] = made[-1]
                kept.append(on)
                return on

            return hook

        def fork(module: nn.Module, inputs: tuple, keywords: dict) -> tuple[tuple, dict]:
            """Lets the gradient through a BatchNorm be told from what else reads the same."""
            input = inputs[0] if inputs else keywords["input"]
            if call := given.get(id(input)):
                input = input.clone()
                call.normed.append(input)
            return (input, *inputs[1:]), {name: value for name, value in keywords.items() if name != "input"}

        kept: list[torch.Tensor] = []  # so that no two have the same id
        modules = {layer.name: self.network.get_submodule(layer.name) for layer in self.layers}
        hooks = [module.register_forward_hook(note(name), with_kwargs=True) for name, module in modules.items()]
        norms = [module for module in self.network.modules() if isinstance(module, _BatchNorm)]
        hooks += [norm.register_forward_pre_hook(fork, with_kwargs=True) for norm in norms]
        try:
            with torch.enable_grad():
                log_p = F.log_softmax(self.network(images.clone().requires_grad_()).float(), 1)
        finally:
            for hook in hooks:
                hook.remove()
        drawn, weight = _labels(log_p.detach().double().exp().cpu(), generator)
        score = (log_p.gather(1, drawn.to(images.device)) * weight.to(images.device).float()).sum()
        for call in made:  # where gradients are switched off nothing comes through a BatchNorm
            call.normed[:] = [tensor for tensor in call.normed if tensor.requires_grad]
        wanted = [tensor for call in made for tensor in (call.output, *call.normed)]
        try:
            found = iter(torch.autograd.grad(score, wanted, materialize_grads=True))
        except RuntimeError as error:
            raise ArqError(
                f"the network's gradient fails ({reason(error)}): sensitivities need one, and so does fine-tuning"
            ) from error
        calls = []
        for call in made:
            gradient, *normed = (next(found).float() for _ in (call.output, *call.normed))
            calls.append(call._replace(output=call.output.detach(), gradient=gradient, normed=normed))
        return calls


def _labels(p: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A class for each image, and the root of what its square counts, both [images, 1], so that means are those over ``p``.

    Drawn in proportion to p (1 - p), about p times the size of the gradient of log p: where the network is sure, the one class has
    no gradient, and from p itself another is hardly ever drawn.
    """
    spread = (p * (1 - p)).clamp_min(1e-12)
    drawn = torch.multinomial(spread, 1, generator=generator)
    return drawn, (p * spread.sum(1, keepdim=True) / spread).gather(1, drawn).sqrt()


class _Call(NamedTuple):
    """What a layer was given for so many images, what it gave, the gradient there, and its parts that come through a BatchNorm."""

    name: str
    images: int
    input: torch.Tensor
    more: tuple
    output: torch.Tensor
    normed: list[torch.Tensor]
    gradient: torch.Tensor = torch.empty(0)

    @torch.no_grad()
    def changes(self, module: Any, quantized: Any) -> list[torch.Tensor]:
        """By how much rounding the weight, and rounding the input, changes each image's log-probability: both [images].

        :param module, quantized: the layer, and what stands for it in a quantized network
        """
        rounded = quantized.integers(self.input) * quantized.activation_step
        run, weight = quantized.kind.run, module.weight
        errors = (
            run(quantized, self.input, quantized.weight - weight, None, *self.more),
            run(quantized, rounded - self.input, weight, None, *self.more),
        )
        return [self._by_image(self._weighed(error)) for error in errors]

    def _weighed(self, error: torch.Tensor) -> torch.Tensor:
        """An error times the gradient; through a BatchNorm without the shift and the scale of each channel."""
        weighed = error * self.gradient
        if self.normed and error.numel() // error.shape[1] >= LEAST_VALUES:
            over = [0, *range(2, error.dim())]
            centred, output = (values - values.mean(over, keepdim=True) for values in (error, self.output.float()))
            share = (centred * output).sum(over, keepdim=True) / output.square().sum(over, keepdim=True).clamp_min(1e-30)
            weighed = weighed + (centred - share * output - error) * sum(self.normed)
        return weighed

    def _by_image(self, values: torch.Tensor) -> torch.Tensor:
        """The sum for each image, which is the first dimension, a part of it, or the second (sequences)."""
        if values.shape[0] != self.images and values.dim() > 2 and values.shape[1] == self.images:
            values = values.transpose(0, 1)
        if values.shape[0] % self.images:
            raise ArqError(
                f"layer {self.name!r} gives {list(values.shape)} for {self.images} images, which does not say what belongs to "
                "which: keep images in the first dimension"
            )
        return values.reshape(self.images, -1).sum(1)


def estimate_sensitivities(order: SecondOrder, map: Callable = builtins.map) -> Sensitivities:
    """The divergence that few bits in one place cause; a place's effects are taken to add up to a map's.

    A place is the weights of a free layer, or the activations it reads (once where layers share them).

    :param map: makes the calls, such as that of :func:`arq_env.support.engines.engine`
    :return: place to [7] divergences in nats, for 2 to 8 bits, not negative and not rising
    :raises ArqError: as :class:`SecondOrder`, and naming the layer where the gradient is not finite
    """
    effects = sum(map(order, range(len(order.parts)))) / len(order.images)
    for place, found in zip(places(order.layers), effects, strict=True):
        if not np.isfinite(found).all():
            raise ArqError(f"the gradient at layer {place[0]!r} is not finite: sensitivities need one, and so does fine-tuning")
    if untouched := sorted({place[0] for place, found in zip(places(order.layers), effects, strict=True) if not found.any()}):
        warnings.warn(
            f"rounding changes nothing at {', '.join(untouched)}, or no gradient comes from there: searches that start from "
            "sensitivities will give it the fewest bits",
            stacklevel=2,
        )
    return {place: for_all_bits(found) for place, found in zip(places(order.layers), effects.tolist(), strict=True)}


def for_all_bits(found: list[float]) -> list[float]:
    """The effects of 2 to 8 bits, not rising, from those of :data:`WITH_EFFECT`; that of 8 is 0.

    >>> for_all_bits([1.0, 0.5, 0.64])
    [1.0, 0.64, 0.64, 0.16, 0.04, 0.01, 0.0]
    """
    effects = [*found, *(found[-1] / 4 ** (bits - WITH_EFFECT[-1]) for bits in range(WITH_EFFECT[-1] + 1, MAX_BITS)), 0.0]
    return [max(effects[i:]) for i in range(len(effects))]  # noise must not make a bit worth less than none


def places(layers: tuple[Layer, ...]) -> list[Place]:
    """What can get bits of its own: each free layer's weights, and its activations where no earlier layer decides them."""
    return [(layer.name, kind) for layer in free_layers(layers) for kind in Bits._fields if kind == "weight" or not layer.tied_to]


def forward_passes() -> int:
    """Images that the sensitivities send through a network, a gradient counted as two, and each rounding as one."""
    return (3 + 2 * len(WITH_EFFECT)) * IMAGES
