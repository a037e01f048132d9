"""From a bit-width map to a quantized network."""

import copy

import torch
from torch import nn

from arq_env.bitwidths import BitWidthMap, check_map
from arq_env.errors import ArqError
from arq_env.layers import Layer
from arq_env.quantization.calibrate import reestimate_batch_norm, sample_activations
from arq_env.quantization.modules import LearnableLayer, quantized_like, replace_module
from arq_env.quantization.quantizers import activation_step, is_signed, weight_steps


class Quantizer:
    """Quantizes one network by any map; what does not depend on the map is computed once and kept.

    :param network: in evaluation mode; it is not changed
    :param layers: from :func:`arq_env.layers.find_layers`
    :param calibration_images: float [n, c, h, w], noisy and augmented as in training, on the network's device
    :raises ArqError: naming the layer, when its weights are not float32
    """

    def __init__(self, network: nn.Module, layers: tuple[Layer, ...], calibration_images: torch.Tensor):
        for layer in layers:
            if (kind := network.get_submodule(layer.name).weight.dtype) != torch.float32:
                raise ArqError(
                    f"layer {layer.name!r} has weights of {kind}: convert the network with .float() before quantizing it"
                )
        self.network, self.layers, self.images = network, layers, calibration_images
        self._activations = sample_activations(network, [layer.name for layer in layers], calibration_images)
        self._signed = {name: is_signed(values) for name, values in self._activations.items()}
        self._tied_to = {layer.name: layer.tied_to or layer.name for layer in layers}
        self._weight_steps, self._activation_steps = {}, {}

    def quantize(self, bit_widths: BitWidthMap) -> nn.Module:
        """Step sizes by mean squared error, then BatchNorm's statistics anew: a quantized copy, in evaluation mode.

        :raises ArqError: naming the layer, when the map is not one for this network
        """
        return self._converted(bit_widths, learnable=False)

    def learnable(self, bit_widths: BitWidthMap) -> nn.Module:
        """The same network in the form that fine-tuning trains: float weights and step sizes are parameters.

        :raises ArqError: as :meth:`quantize`
        """
        return self._converted(bit_widths, learnable=True)

    def freeze(self, network: nn.Module) -> nn.Module:
        """Turn a fine-tuned network into a quantized copy: in evaluation mode, BatchNorm's statistics anew."""
        quantized = copy.deepcopy(network)
        for layer in self.layers:
            if isinstance(module := quantized.get_submodule(layer.name), LearnableLayer):
                replace_module(quantized, layer.name, module.frozen())
        reestimate_batch_norm(quantized.eval(), self.images)
        return quantized

    def _converted(self, bit_widths, *, learnable):
        check_map(bit_widths, self.layers)
        quantized = copy.deepcopy(self.network)
        for name, bits in bit_widths.items():
            original = quantized.get_submodule(name)
            module = quantized_like(original, name, learnable=learnable)
            module.set_bits(
                original.weight.detach(),
                self._weight_step(name, bits.weight),
                bits.weight,
                self._activation_step(name, bits.activation),
                bits.activation,
                signed=self._signed[name],
            )
            if learnable and self._tied_to[name] != name:  # one step for the one tensor that both read
                module.activation_log_step = quantized.get_submodule(self._tied_to[name]).activation_log_step
            replace_module(quantized, name, module)
        reestimate_batch_norm(quantized, self.images)
        return quantized

    def _weight_step(self, name, bits):
        if (name, bits) not in self._weight_steps:
            self._weight_steps[name, bits] = weight_steps(self.network.get_submodule(name).weight, bits)
        return self._weight_steps[name, bits]

    def _activation_step(self, name, bits):
        name = self._tied_to[name]
        if (name, bits) not in self._activation_steps:
            self._activation_steps[name, bits] = activation_step(self._activations[name], bits)
        return self._activation_steps[name, bits]
