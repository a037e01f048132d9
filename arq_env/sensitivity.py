"""How far few bits drive a network's predictions from FP32's: of a whole map, and of one place, for searches that add these up."""

import builtins
from collections.abc import Callable

import torch
import torch.nn.functional as F

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, complete, free_layers
from arq_env.layers import Layer
from arq_env.problem import Problem
from arq_env.quantization import Quantizer
from arq_env.quantization.exact import exact_means
from arq_env.support.batches import batch_size

#: Bit-widths that are measured; from the last of them on a bit more is taken to divide the effect by four, as it does the
#: power of the quantization noise.
MEASURED = (2, 3, 4)
#: Noisy images that the predictions are compared on.
IMAGES = 512

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
        self.quantizer, self.layers = quantizer, problem.layers
        self._images = problem.calibration_images(seed + 1, IMAGES)
        self._target = _log_probabilities(problem.network, self._images)

    def __call__(self, bit_widths: BitWidthMap) -> float:
        """The divergence of a whole map."""
        with exact_means():
            got = _log_probabilities(self.quantizer.quantize(bit_widths), self._images)
        return F.kl_div(got, self._target, reduction="batchmean", log_target=True).item()


def measure_sensitivities(divergence: Divergence, map: Callable = builtins.map) -> Sensitivities:
    """The divergence of few bits in one place and 8 elsewhere, less that of 8 bits everywhere.

    A place is the weights of a free layer, or the activations it reads (once where layers share them). The distance is that of
    CLADO and of HAWQ's successors that use no Hessian; the layers are taken to add up.

    :param map: makes the calls, such as that of :func:`arq_env.support.engines.engine`
    :return: place to [7] divergences in nats, for 2 to 8 bits, not negative and not rising
    """
    layers, untouched = divergence.layers, Bits(MAX_BITS, MAX_BITS)
    widest = dict.fromkeys((layer.name for layer in layers), untouched)
    least = divergence(widest)  # first, so that workers get the steps of 8 bits
    chosen = [{layer: untouched._replace(**{kind: b})} for layer, kind in places(layers) for b in MEASURED]
    found = iter(map(divergence, [complete(widest | one, layers) for one in chosen]))
    table: Sensitivities = {}
    for layer, kind in places(layers):
        measured = [max(next(found) - least, 0.0) for _ in MEASURED]
        rest = [measured[-1] / 4 ** (b - MEASURED[-1]) for b in range(MEASURED[-1] + 1, MAX_BITS)]
        falling = [*measured, *rest, 0.0]
        table[layer, kind] = [max(falling[i:]) for i in range(len(falling))]  # noise must not make a bit worth less than none
    return table


def places(layers: tuple[Layer, ...]) -> list[Place]:
    """What can get bits of its own: each free layer's weights, and its activations where no earlier layer decides them."""
    return [(layer.name, kind) for layer in free_layers(layers) for kind in Bits._fields if kind == "weight" or not layer.tied_to]


def forward_passes(layers: tuple[Layer, ...], calibration_images: int) -> int:
    """Images that :func:`measure_sensitivities` sends through a quantized network, BatchNorm's calibration included."""
    return (1 + len(MEASURED) * len(places(layers))) * (calibration_images + IMAGES)


@torch.inference_mode()
def _log_probabilities(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([F.log_softmax(network(part), 1) for part in images.split(batch_size(images[0].numel(), 32))])
