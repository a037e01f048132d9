"""From a bit-width map to a quantized network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from arq_env.bitwidths import MAX_BITS, Bits, BitWidthMap, check_map
from arq_env.layers import Layer, Layers
from arq_env.networks.checkpoints import copy_network
from arq_env.quantization.calibrate import reestimate_batch_norm, sample_activations
from arq_env.quantization.exact import EXACT, exact_norms
from arq_env.quantization.integer import on_integers
from arq_env.quantization.modules import LearnableLayer, QuantizedLayer, UnroundedLayer, replace_module
from arq_env.quantization.quantizers import ActivationLevels, activation_levels, weight_steps
from arq_env.support.errors import ArqError

#: By how much outputs may differ with rounding left out, as a part of the largest: kernels for other layouts round differently.
ROUNDING = 1e-3


class Quantizer:
    """Quantizes one network by any map; what does not depend on the map is computed once and kept.

    :param network: in evaluation mode; it is not changed
    :param layers: from :func:`arq_env.layers.find_layers`
    :param calibration_images: float [n, c, h, w], noisy and augmented as in training, on the network's device
    :raises ArqError: naming the layer, as :func:`arq_env.quantization.calibrate.sample_activations`
    """

    def __init__(self, network: nn.Module, layers: Layers, calibration_images: torch.Tensor):
        self.network, self.layers, self.images = network, layers, calibration_images
        #: Whose weights are quantized.
        self.source = network
        self._activations = sample_activations(network, layers, calibration_images)
        self._tied_to = {layer.name: layer.tied_to or layer.name for layer in layers}
        self._weight_steps: dict[tuple[str, int], torch.Tensor] = {}
        self._activation_levels: dict[tuple[str, int], ActivationLevels] = {}

    def quantize(self, bit_widths: BitWidthMap, *, integers: bool = False) -> nn.Module:
        """Step sizes by mean squared error, then BatchNorm's statistics anew: a quantized copy, in evaluation mode.

        :param integers: on integer kernels where they give the same bits (:func:`arq_env.quantization.integer.on_integers`)
        :raises ArqError: naming the layer, when the map is not one for this network
        """
        quantized = self.convert(bit_widths)
        reestimate_batch_norm(on_integers(quantized) if integers else quantized, self.images)
        return quantized

    def convert(self, bit_widths: BitWidthMap) -> nn.Module:
        """What :meth:`quantize` returns, with the statistics of BatchNorm that were there before.

        :raises ArqError: as :meth:`quantize`
        """
        return exact_norms(self._converted(bit_widths, lambda module, layer: QuantizedLayer(module, layer.name)))

    def learnable(self, bit_widths: BitWidthMap) -> nn.Module:
        """The same network in the form that fine-tuning trains: float weights and step sizes are parameters.

        :raises ArqError: as :meth:`quantize`
        """
        network = self._converted(bit_widths, LearnableLayer)
        reestimate_batch_norm(network, self.images)
        for name, first in self._tied_to.items():
            if name != first:  # one step for the one tensor that both read
                network.get_submodule(name).activation_log_step = network.get_submodule(first).activation_log_step
        return network

    def freeze(self, network: nn.Module) -> nn.Module:
        """Turn a fine-tuned network into a quantized copy: in evaluation mode, BatchNorm's statistics anew."""
        quantized = copy_network(network)
        for layer in self.layers:
            if isinstance(module := quantized.get_submodule(layer.name), LearnableLayer):
                replace_module(quantized, layer.name, module.frozen())
        reestimate_batch_norm(exact_norms(quantized.eval()), self.images)
        return quantized

    def exact(self) -> bool:
        """Whether every map's network rounds alike on every processor, thread count and batch size.

        That is, whether it is made of known operators only, and even 8 bits have sums that float32 holds exactly.
        """
        if not self.layers.operators <= EXACT or self.layers.kept:
            return False
        widest = {layer.name: Bits(MAX_BITS, MAX_BITS) for layer in self.layers}
        quantized = [module for module in self.convert(widest).modules() if isinstance(module, QuantizedLayer)]
        return all(layer.largest_sum() < 2**24 for layer in quantized)

    def _converted(self, bit_widths, make: Callable[[nn.Module, Layer], QuantizedLayer | LearnableLayer]) -> nn.Module:
        check_map(bit_widths, self.layers)

        def convert(module, layer):
            new, bits = make(module, layer), bit_widths[layer.name]
            step, lowest = self.activation_levels(layer.name, bits.activation)
            steps = self.weight_steps(layer.name, bits.weight, new)
            new.set_bits(module.weight.detach(), steps, bits.weight, step, bits.activation, lowest=lowest)
            return new

        return converted(self.source, self.layers, convert)

    @property
    def unrounded(self) -> nn.Module:
        """The network that maps round: here the base network."""
        return self.network

    def weight_steps(self, name: str, bits: int, layer: Any) -> torch.Tensor:
        """Steps of a layer's weights by mean squared error, [out].

        :param layer: what will stand for it
        """
        if (name, bits) not in self._weight_steps:
            rows = layer.rows(self.source.get_submodule(name).weight)
            self._weight_steps[name, bits] = weight_steps(rows, bits)
        return self._weight_steps[name, bits]

    def activation_levels(self, name: str, bits: int) -> ActivationLevels:
        """Step and least integer of what a layer reads, by mean squared error."""
        name = self._tied_to[name]
        if (name, bits) not in self._activation_levels:
            values, weights = self._activations[name]
            self._activation_levels[name, bits] = activation_levels(values, bits, weights)
        return self._activation_levels[name, bits]


def converted(network: nn.Module, layers: tuple[Layer, ...], convert: Callable[[nn.Module, Layer], nn.Module]) -> nn.Module:
    """A copy of the network with ``convert(module, layer)`` in the place of each layer."""
    new = copy_network(network)
    for layer in layers:
        replace_module(new, layer.name, convert(new.get_submodule(layer.name), layer))
    for module in new.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused path in torch reads the weights of its layers past their forward; this is one of the conditions for it.
            module.activation_relu_or_gelu = 0
    return new


@torch.inference_mode()
def check_conversion(network: nn.Module, layers: tuple[Layer, ...], images: torch.Tensor) -> None:
    """Make sure that a network can be judged, and that its converted form computes the same when nothing is rounded.

    :param images: float [2 or more, c, h, w]
    :raises ArqError: saying what is wrong: outputs that are no logits, that are random or depend on the rest of the batch, and,
        naming the first layer, a conversion that changes what is computed
    """
    expected, inputs = _run(network, layers, images, fused=False)
    if not expected.isfinite().all():
        raise ArqError("the network gives NaN or infinite logits")
    again, _ = _run(network, layers, images)
    if not _close(again, expected):
        raise ArqError("the network gives the same images different outputs each time: make it deterministic in evaluation mode")
    if not _close(_run(network, layers, images[:1])[0], expected[:1]):
        raise ArqError("what the network says of an image depends on the images beside it: a certificate would be of the batch")

    def unrounded(module, layer):
        new = UnroundedLayer(module, layer.name)
        new.set_weight(module.weight)
        return new

    got, seen = _run(converted(network, layers, unrounded), layers, images)
    for layer in layers:
        reads, was = seen.get(layer.name, []), inputs.get(layer.name, [])
        if len(was) != layer.calls:
            raise ArqError(
                f"layer {layer.name!r} is called {layer.calls} times for one image of noise and {len(was)} times for others: a "
                "network whose path depends on the image has no fixed cost and cannot be quantized"
            )
        if len(reads) != len(was) or not all(map(_close, reads, was)):
            raise ArqError(
                f"at layer {layer.name!r} the converted network differs although nothing is rounded, so the network uses layers "
                "in a way that is not understood: leave those before it at full precision (keep), or call them as modules"
            )
    if not _close(got, expected):
        raise ArqError("the converted network gives other outputs although nothing is rounded: its last layers are not understood")
    with torch.random.fork_rng():
        try:
            _run(copy_network(network).train(), (), images)
        except Exception as error:
            raise ArqError(
                f"in training mode, which fine-tuning needs, the network does not work ({error}): switch off what differs "
                "there, such as auxiliary outputs"
            ) from error


def _run(network, layers, images, *, fused: bool = True) -> tuple[torch.Tensor, dict[str, list[torch.Tensor]]]:
    """Outputs, and what each layer read at each call.

    :param fused: whether torch may run attention past the modules' own forwards, as it does by default
    """
    allowed = torch.backends.mha.get_fastpath_enabled()
    reads: dict[str, list[torch.Tensor]] = {}

    def note(name, forward):
        def noting(*args, **kwargs):
            reads.setdefault(name, []).append((args[0] if args else kwargs["input"]).clone())
            return forward(*args, **kwargs)

        return noting

    modules = [network.get_submodule(layer.name) for layer in layers]
    try:
        for layer, module in zip(layers, modules, strict=True):
            module.forward = note(layer.name, module.forward)  # a hook would switch off torch's fused paths
        torch.backends.mha.set_fastpath_enabled(fused and allowed)
        output = network(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(allowed)
        for module in modules:
            vars(module).pop("forward", None)
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(images) or output.shape[1] < 2:
        what = f"a tensor {[*output.shape]}" if isinstance(output, torch.Tensor) else f"a {type(output).__name__}"
        raise ArqError(
            f"the network gives {what} for {len(images)} images: wrap it in a module that returns logits [images, classes] of two "
            "classes or more"
        )
    return output, reads


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= ROUNDING * b.abs().max())
