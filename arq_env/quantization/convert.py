"""From a bit-width map to a quantized network."""

import copy

import torch
from torch import nn

from arq_env.bitwidths import BitWidthMap, check_map
from arq_env.layers import Layer
from arq_env.quantization.calibrate import reestimate_batch_norm, sample_activations
from arq_env.quantization.modules import quantized_like
from arq_env.quantization.quantizers import activation_step, is_signed, weight_steps


class Quantizer:
    """Quantizes one network by any map; what does not depend on the map is computed once and kept.

    :param network: in evaluation mode; it is not changed
    :param layers: from :func:`arq_env.layers.find_layers`
    :param calibration_images: float [n, c, h, w], noisy and augmented as in training, on the network's device
    """

    def __init__(self, network: nn.Module, layers: tuple[Layer, ...], calibration_images: torch.Tensor):
        self.network, self.layers, self.images = network, layers, calibration_images
        self._activations = sample_activations(network, [layer.name for layer in layers], calibration_images)
        self._signed = {name: is_signed(values) for name, values in self._activations.items()}
        self._weight_steps, self._activation_steps = {}, {}

    def quantize(self, bit_widths: BitWidthMap) -> nn.Module:
        """Step sizes by mean squared error, then BatchNorm's statistics anew: a quantized copy, in evaluation mode.

        :raises ArqError: naming the layer, when the map is not one for this network
        """
        check_map(bit_widths, self.layers)
        quantized = copy.deepcopy(self.network)
        for name, bits in bit_widths.items():
            original = quantized.get_submodule(name)
            module = quantized_like(original)
            module.set_bits(
                original.weight.detach(),
                self._weight_step(name, bits.weight),
                bits.weight,
                self._activation_step(name, bits.activation),
                bits.activation,
                signed=self._signed[name],
            )
            _replace(quantized, name, module)
        reestimate_batch_norm(quantized, self.images)
        return quantized

    def _weight_step(self, name, bits):
        if (name, bits) not in self._weight_steps:
            self._weight_steps[name, bits] = weight_steps(self.network.get_submodule(name).weight, bits)
        return self._weight_steps[name, bits]

    def _activation_step(self, name, bits):
        if (name, bits) not in self._activation_steps:
            self._activation_steps[name, bits] = activation_step(self._activations[name], bits)
        return self._activation_steps[name, bits]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)
