"""A network compiled for a great many forward passes."""

import copy

import torch
from torch._inductor import config as inductor

from arq_env.certification.digest import network_digest
from arq_env.certification.inputs import whole
from arq_env.support.errors import ArqError, shown


class CompiledNetwork(torch.nn.Module):
    """``network`` through ``torch.compile`` with its weights as constants, BatchNorm folded into them.

    About 1.5 times as fast as the network itself on a CPU after half a minute of compilation; needs a C++ compiler. Logits
    differ in rounding. Batches are split and filled up to one size, so that nothing is compiled twice. It can be sent to
    worker processes, each of which compiles once.

    :param network: in evaluation mode; changing its weights afterwards has no effect
    :param batch_size: images of a forward pass
    :raises ArqError: unless these are a torch module and a whole number from 1
    """

    def __init__(self, network: torch.nn.Module, batch_size: int = 16):
        super().__init__()
        if not isinstance(network, torch.nn.Module):
            raise ArqError(f"network is {shown(network)}: give a torch module")
        self.network, self.batch_size = network, whole("batch_size", batch_size, 1, 2**31 - 1)
        self._compiled = torch.compile(network, dynamic=False)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._run(part) for part in images.split(self.batch_size)])

    def _run(self, images):
        filled = images.new_zeros(self.batch_size, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
        filled[: len(images)] = images
        # Freezing must be on while the first call is traced; as an option of compile it comes too late to have an effect.
        with inductor.patch(freezing=True):
            return self._compiled(filled)[: len(images)]

    def __copy__(self):
        return CompiledNetwork(self.network, self.batch_size)

    def __deepcopy__(self, memo):
        return CompiledNetwork(copy.deepcopy(self.network, memo), self.batch_size)

    def __reduce__(self):
        return _in_this_process, (self.network, self.batch_size)


#: The network that arrived in this process last, with what it was made from.
_latest: dict[tuple[str, int], CompiledNetwork] = {}


def _in_this_process(network: torch.nn.Module, batch_size: int) -> CompiledNetwork:
    """What arrives with every task of a ``map`` is the same network: keep its compilation, as long as it is unchanged."""
    key = network_digest(network), batch_size
    if key not in _latest or network_digest(_latest[key].network) != key[0]:
        _latest.clear()
        _latest[key] = CompiledNetwork(network, batch_size)
    return _latest[key]
