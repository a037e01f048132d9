"""How much a network minds few bits in one place: the input of searches that add up single effects."""

import torch
import torch.nn.functional as F

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, complete, free_layers
from arq_env.problem import CALIBRATION_IMAGES, Problem
from arq_env.quantization import Quantizer

#: Bit-widths that are measured; from the last of them on a bit more is taken to divide the effect by four, as it does the
#: power of the quantization noise.
MEASURED = (2, 3, 4)
#: Noisy images that the predictions are compared on.
IMAGES = 512

#: (layer name, "weight" or "activation") to the effect of MIN_BITS, ..., MAX_BITS there.
Sensitivities = dict[tuple[str, str], list[float]]


def measure_sensitivities(problem: Problem, quantizer: Quantizer, seed: int = 0) -> Sensitivities:
    """Mean KL divergence of the FP32 network's predictions from those with few bits in one place and 8 elsewhere.

    A place is the weights of a free layer, or the activations it reads (once where layers share them). Measured on noisy
    training images with BatchNorm estimated anew, as in the reward's evaluation, less the divergence at 8 bits
    everywhere. The distance is that of CLADO and of HAWQ's successors that use no Hessian; the layers are taken to add up.

    :param quantizer: of the problem's network, calibrated
    :param seed: of images and noise
    :return: place to [7] divergences in nats, for 2 to 8 bits, not negative and not rising
    """
    images = problem.calibration_images(seed + 1)[:IMAGES]
    target = _log_probabilities(problem.network, images)

    def divergence(chosen: BitWidthMap) -> float:
        bit_widths = complete(chosen, problem.layers, MAX_BITS)
        got = _log_probabilities(quantizer.quantize(bit_widths), images)
        return F.kl_div(got, target, reduction="batchmean", log_target=True).item()

    untouched = Bits(MAX_BITS, MAX_BITS)
    least = divergence({})
    table = {}
    for layer, kind in places(problem.layers):
        measured = [max(divergence({layer: untouched._replace(**{kind: b})}) - least, 0.0) for b in MEASURED]
        rest = [measured[-1] / 4 ** (b - MEASURED[-1]) for b in range(MEASURED[-1] + 1, MAX_BITS)]
        falling = [*measured, *rest, 0.0]
        table[layer, kind] = [max(falling[i:]) for i in range(len(falling))]  # noise must not make a bit worth less than none
    return table


def places(layers) -> list[tuple[str, str]]:
    """What can get bits of its own: each free layer's weights, and its activations where no earlier layer decides them."""
    return [(layer.name, kind) for layer in free_layers(layers) for kind in Bits._fields if kind == "weight" or not layer.tied_to]


def forward_passes(problem: Problem) -> int:
    """Images that :func:`measure_sensitivities` sends through a quantized network, BatchNorm's calibration included."""
    return (1 + len(MEASURED) * len(places(problem.layers))) * (CALIBRATION_IMAGES + IMAGES)


@torch.inference_mode()
def _log_probabilities(network, images) -> torch.Tensor:
    return torch.cat([F.log_softmax(network(part), 1) for part in images.split(32)])
