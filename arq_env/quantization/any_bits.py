"""One network for every map: weights that all bit-widths share, and step sizes of each bit-width of each place, learned together.

As a supernet is trained (the sandwich rule of Yu and Huang, ICCV 2019), here over bit-widths: each step draws a few maps, the
fewest and the most bits always among them, and adds up their gradients. Then any map within the range is quantized from the one
file, BatchNorm's statistics estimated anew, and needs no training of its own.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from arq_env.bitwidths import Bits, BitWidthMap, check_map, fixed_layers
from arq_env.layers import Layers
from arq_env.networks.checkpoints import channels_last, copy_network, give_state, read_weights, save_checkpoint
from arq_env.quantization.calibrate import reestimate_batch_norm
from arq_env.quantization.convert import Quantizer, converted
from arq_env.quantization.modules import LearnableLayer
from arq_env.quantization.quantizers import ActivationLevels
from arq_env.support.errors import ArqError, reason
from arq_env.support.files import checked_path


class AnyBitsLayer(LearnableLayer):
    """A learnable layer with steps for several bit-widths; :meth:`choose` says which of them the forward pass rounds to.

    ``weight_log_steps`` and ``activation_log_steps`` hold the logarithms of the steps by the number of bits, ``lowest_levels`` the
    least integers that inputs are rounded to.
    """

    def __init__(self, module, layer):
        super().__init__(module, layer)
        self.weight_log_steps, self.activation_log_steps = nn.ParameterDict(), nn.ParameterDict()
        self.lowest_levels = nn.Module()
        self.rounds = True

    def add_weight_bits(self, bits: int, step: torch.Tensor) -> None:
        """Have ``bits`` for weights, with these steps [out]."""
        self.weight_log_steps[str(bits)] = nn.Parameter(step.detach().log())

    def add_activation_bits(self, bits: int, step: torch.Tensor, lowest: int) -> None:
        """Have ``bits`` for activations, with this step []."""
        self.activation_log_steps[str(bits)] = nn.Parameter(step.detach().log())
        self.lowest_levels.register_buffer(str(bits), torch.tensor(lowest))

    def choose(self, bits: Bits) -> None:
        """Round to these bits from now on.

        :raises ArqError: when the network was not trained for them
        """
        for what, number, steps in zip(Bits._fields, bits, (self.weight_log_steps, self.activation_log_steps), strict=True):
            if str(number) not in steps:
                raise ArqError(
                    f"layer {self.name!r} has any-bits weights for {', '.join(sorted(steps))} {what} bits, and the map gives it "
                    f"{number}: train them with the same --fix and --bits"
                )
        self.weight_bits, self.activation_bits = bits
        self.lowest = int(getattr(self.lowest_levels, str(bits.activation)))

    @property
    def weight_step(self) -> torch.Tensor:
        """Step sizes of the weights at the chosen bits, [out]."""
        return self.weight_log_steps[str(self.weight_bits)].exp()

    @property
    def activation_step(self) -> torch.Tensor:
        """Step size of the input at the chosen bits, []."""
        return self.activation_log_steps[str(self.activation_bits)].exp()

    def forward(self, input: torch.Tensor, *more) -> torch.Tensor:
        """The layer's operation at the chosen bits."""
        return super().forward(input, *more) if self.rounds else self.kind.run(self, input, self.weight, self.bias, *more)


def start_any_bits(quantizer: Quantizer) -> nn.Module:
    """The base network with an :class:`AnyBitsLayer` in the place of each layer: its weights, and the steps of calibration.

    A free layer has all of the layers' bit-widths, a fixed one its own.
    """
    layers = quantizer.layers
    fixed = fixed_layers(layers)

    def convert(module, layer):
        new = AnyBitsLayer(module, layer)
        new.weight = nn.Parameter(module.weight.detach().clone())
        for bits in [fixed[layer.name].weight] if layer.name in fixed else layers.widths:
            new.add_weight_bits(bits, quantizer.weight_steps(layer.name, bits, new))
        for bits in [fixed[layer.name].activation] if layer.name in fixed else layers.widths:
            new.add_activation_bits(bits, *quantizer.activation_levels(layer.name, bits))
        return new

    return _tied(converted(quantizer.network, layers, convert), layers)


def _tied(network: nn.Module, layers: Layers) -> nn.Module:
    """One step for the one tensor that several layers read."""
    for layer in layers:
        if layer.tied_to:
            module, first = network.get_submodule(layer.name), network.get_submodule(layer.tied_to)
            module.activation_log_steps, module.lowest_levels = first.activation_log_steps, first.lowest_levels
    return network


def choose(network: nn.Module, bit_widths: BitWidthMap) -> None:
    """Round to a map's bits from now on.

    :raises ArqError: naming the layer, when the network was not trained for them
    """
    for name, bits in bit_widths.items():
        module: Any = network.get_submodule(name)
        module.choose(bits)


class ManyMaps(nn.Module):
    """An any-bits network that in training answers for several maps at once: logits [maps x b, classes], a map after the other.

    :param draw: from a generator to the maps of a step
    """

    passes: torch.Tensor

    def __init__(self, network: nn.Module, draw: Callable[[np.random.Generator], list[BitWidthMap]], seed: int = 0):
        super().__init__()
        self.network, self.draw, self.seed = network, draw, seed
        self.register_buffer("passes", torch.tensor(0))  # part of the state, so that a resumed training draws what it would have

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        if not self.training:
            return self.network(images)
        maps = self.draw(np.random.default_rng([self.seed, int(self.passes)]))
        self.passes += 1
        logits = []
        for bit_widths in maps:
            choose(self.network, bit_widths)
            logits.append(self.network(images))
        return torch.cat(logits)


class AnyBitsQuantizer(Quantizer):
    """Quantizes one any-bits network by any map that it was trained for.

    :param network: the FP32 network that it was made from
    :param calibration_images: for BatchNorm's statistics, as for :class:`arq_env.quantization.Quantizer`
    :param any_bits: from :func:`start_any_bits` or :func:`load_any_bits`; it is not changed
    """

    def __init__(self, network: nn.Module, layers: Layers, calibration_images: torch.Tensor, any_bits: nn.Module):
        super().__init__(network, layers, calibration_images)
        self.source = copy_network(any_bits).eval()

    def quantize(self, bit_widths: BitWidthMap, *, integers: bool = False) -> nn.Module:
        """As :meth:`arq_env.quantization.Quantizer.quantize`.

        :raises ArqError: naming the layer, also when the network was not trained for its bits
        """
        self._check_trained(bit_widths)
        return super().quantize(bit_widths, integers=integers)

    def learnable(self, bit_widths: BitWidthMap) -> nn.Module:
        """As :meth:`arq_env.quantization.Quantizer.learnable`.

        :raises ArqError: as :meth:`quantize`
        """
        self._check_trained(bit_widths)
        return super().learnable(bit_widths)

    def _check_trained(self, bit_widths: BitWidthMap) -> None:
        check_map(bit_widths, self.layers)
        choose(self.source, bit_widths)

    @property
    def unrounded(self) -> nn.Module:
        """The any-bits network with nothing rounded."""
        network = copy_network(self.source)
        for module in network.modules():
            if isinstance(module, AnyBitsLayer):
                module.rounds = False
        reestimate_batch_norm(network, self.images)
        return network

    def weight_steps(self, name: str, bits: int, layer: Any) -> torch.Tensor:
        """The steps learned, or where none were, those of calibration, with which bits are looked at that no map may have."""
        learned = _steps(self.source.get_submodule(name), "weight")
        return _exact_exp(learned[str(bits)]) if str(bits) in learned else super().weight_steps(name, bits, layer)

    def activation_levels(self, name: str, bits: int) -> ActivationLevels:
        """As :meth:`weight_steps`."""
        module: Any = self.source.get_submodule(name)
        learned = _steps(module, "activation")
        if str(bits) not in learned:
            return super().activation_levels(name, bits)
        return ActivationLevels(_exact_exp(learned[str(bits)]), int(getattr(module.lowest_levels, str(bits))))


def _steps(module: Any, what: str) -> nn.ParameterDict:
    return getattr(module, f"{what}_log_steps")


def _exact_exp(log_step: torch.Tensor) -> torch.Tensor:
    """Rounded from float64, in whose last places alone processors differ."""
    return log_step.detach().double().exp().float()


def save_any_bits(network: nn.Module, path: Path, card: dict) -> dict:
    """Write an any-bits network and its card, as :func:`arq_env.networks.checkpoints.save_checkpoint`."""
    return save_checkpoint(network, path, card)


def load_any_bits(path: Path, base: nn.Module, layers: Layers) -> tuple[nn.Module, dict]:
    """The any-bits network that :func:`save_any_bits` wrote, in evaluation mode, and its card.

    :param base: the FP32 network, or one of its structure
    :raises ArqError: when a file is missing, damaged or of another network
    """
    path = checked_path("path", path)
    try:
        state, card = read_weights(path)
        if not any(".weight_log_steps." in key for key in state):
            raise ArqError(f"{path} holds no any-bits weights: give what experiments/train_any_bits.py made")

        def convert(module, layer):
            new = AnyBitsLayer(module, layer)
            new.weight = nn.Parameter(torch.empty_like(module.weight))
            for key in state:
                prefix, _, bits = key.rpartition(".")
                if prefix == f"{layer.name}.weight_log_steps":
                    new.add_weight_bits(int(bits), torch.ones_like(state[key]))
                if prefix == f"{layer.name}.activation_log_steps":
                    new.add_activation_bits(
                        int(bits), torch.ones_like(state[key]), int(state[f"{layer.name}.lowest_levels.{bits}"])
                    )
            return new

        network = converted(base, layers, convert)
        give_state(network, state)
    except ArqError:
        raise
    except Exception as error:  # whatever a file of something else leads to
        raise ArqError(
            f"{path} cannot be loaded ({reason(error)}): give what experiments/train_any_bits.py made for this network"
        ) from error
    return channels_last(_tied(network, layers).eval()), card
