"""Arithmetic that rounds alike on every processor, on any number of threads and in any batch: what is left besides integers."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from arq_env.operations import record_operations
from arq_env.quantization.modules import QuantizedLayer, replace_module
from arq_env.support.errors import ArqError

#: Operators whose results no processor, thread count or batch size changes in a quantized network: they move values, or round one
#: product, one sum or one quotient; or they are replaced here or by integers.
# fmt: off
EXACT = frozenset((
    "convolution", "addmm", "mm", "linear", "native_batch_norm", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "mean", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "relu", "relu_", "hardtanh", "hardtanh_",
    "clamp", "clamp_", "clamp_min", "clamp_min_", "maximum", "minimum", "max_pool2d_with_indices", "max_pool2d", "add",
    "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "neg", "t", "transpose", "permute", "view",
    "_unsafe_view", "reshape", "_reshape_copy", "flatten", "unflatten", "slice", "select", "cat", "constant_pad_nd",
    "expand", "squeeze", "unsqueeze", "detach", "clone", "contiguous", "alias", "empty", "zeros", "new_zeros", "copy_",
    "as_strided", "split", "chunk", "narrow",
))
# fmt: on


#: Of quantized layers and norms in addition.
_OF_LAYERS = frozenset(("_to_copy", "round_", "rsqrt"))
#: So many numbers are summed in float64, where their order does not matter any more.
LAST = 128


class ExactNorm(_BatchNorm):
    """BatchNorm whose statistics are summed in one order, and which scales by one product and one sum a value.

    torch's own kernel may fuse the two, or not, and its sums depend on the number of threads.
    """

    def __init__(self, norm: _BatchNorm):
        nn.Module.__init__(self)
        self.__dict__.update(norm.__dict__)

    def _check_input_dim(self, input):
        pass

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As BatchNorm in evaluation mode; in training mode by the batch's statistics, which go into the running ones."""
        if self.training or self.running_mean is None or self.running_var is None:
            scale, shift = self.scale_and_shift(*self._statistics(input))
        else:
            scale, shift = self.scale_and_shift(self.running_mean.double(), self.running_var.double())
        shape = (-1, *[1] * (input.dim() - 2))
        return (input * scale.to(input.dtype).view(shape)).add_(shift.to(input.dtype).view(shape))

    def scale_and_shift(self, mean: torch.Tensor, variance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and shift of each channel under these statistics, all float64 [channels]."""
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.double()
        shift = -mean * scale if self.bias is None else self.bias.double() - mean * scale
        return scale, shift

    def _statistics(self, input):
        count, shape = input.numel() // input.shape[1], (-1, *[1] * (input.dim() - 2))
        mean = _sum_by_channel(input) / count
        # about the rounded mean, so that squares of large numbers do not hide a small variance
        middle = mean.to(input.dtype)
        variance = _sum_by_channel((input - middle.view(shape)).square_()) / count - (mean - middle.double()).square()
        if self.training and self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            for running, new in ((self.running_mean, mean), (self.running_var, variance * count / max(count - 1, 1))):
                running.copy_(running.double() * (1 - share) + new * share)
        return mean, variance


def _sum_by_channel(input: torch.Tensor) -> torch.Tensor:
    """Sums over all but the channels, float64 [channels], always in the same order: one half of the positions plus the other."""
    rows = input.movedim(1, -1).reshape(-1, input.shape[1])
    while len(rows) > LAST:
        half = len(rows) // 2
        summed = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            summed[0] += rows[-1]
        rows = summed
    return rows.sum(0, dtype=torch.float64)


def exact_norms(network: nn.Module) -> nn.Module:
    """Put :class:`ExactNorm` in the place of each of torch's own BatchNorm modules; return the network."""
    for name, module in list(network.named_modules()):
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and name:
            replace_module(network, name, ExactNorm(module))
    return network


class _ExactMeans(TorchFunctionMode):
    """Means over positions, in whatever way they are written, summed in float64."""

    MEANS = (torch.mean, torch.Tensor.mean)
    POOLS = (nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_avg_pool1d)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (*self.MEANS, *self.POOLS) and args[0].dtype == torch.float32 and "dtype" not in kwargs:
            # not by dtype=: the exporter to ONNX makes of that a mean of float32 that is turned into float64
            return function(args[0].double(), *args[1:], **kwargs).float()
        return function(*args, **kwargs)


class ExactNetwork(nn.Module):
    """A quantized network as one function of an image: the same logits in any batch, on any number of threads.

    Sums of integers are exact, means are summed in float64, and all else is one rounded operation a value. It is what
    :class:`arq_env.certification.GridNoise` is for.

    :param network: in evaluation mode, on the CPU
    :param input_shape: of one image, as [c, h, w]
    :raises ArqError: where it has operators of which that is not known, layers that are not quantized or sums beyond 2^24, naming
        them, and where it cannot be run
    """

    def __init__(self, network: nn.Module, input_shape: tuple[int, ...]):
        super().__init__()
        self.network = network
        layers = {name: module for name, module in self.named_modules() if isinstance(module, QuantizedLayer)}
        for name, layer in layers.items():
            if layer.largest_sum() >= 2**24 or layer.codes.device.type != "cpu":
                raise ArqError(f"layer {name!r} can have sums of 2^24 or more, or is not on the CPU: its sums are not exact")
        self.eval()
        with torch.no_grad():
            found = record_operations(self, torch.zeros(1, *input_shape))
        if others := found.operators - EXACT - _OF_LAYERS:
            raise ArqError(
                f"the network uses {', '.join(sorted(others))}, which may round otherwise in another batch: it is not exact"
            )
        if floats := [name for name in found.macs if name not in layers]:
            raise ArqError(f"the network multiplies in float32 ({', '.join(floats)}), not in integers alone: it is not exact")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        with exact_means():
            return self.network(images)


@contextmanager
def exact_means():
    """Sum the means of float32 tensors in float64 while the block runs."""
    with _ExactMeans():
        yield
