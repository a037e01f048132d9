"""Arithmetic that rounds alike on every processor, on any number of threads and in any batch: what is left besides integers."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from arq_env.quantization.modules import replace_module

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
        if function in self.MEANS and args[0].dtype == torch.float32 and "dtype" not in kwargs:
            return function(*args, **kwargs, dtype=torch.float64).float()
        if function in self.POOLS and args[0].dtype == torch.float32:
            return function(args[0].double(), *args[1:], **kwargs).float()
        return function(*args, **kwargs)


@contextmanager
def exact_means():
    """Sum the means of float32 tensors in float64 while the block runs."""
    with _ExactMeans():
        yield
