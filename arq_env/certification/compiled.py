"""A network compiled for a great many forward passes."""

import torch


class CompiledNetwork(torch.nn.Module):
    """``network`` through ``torch.compile`` with its weights as constants, BatchNorm folded into them.

    About 1.4 times as fast as the network itself on a CPU after half a minute of compilation; needs a C++ compiler. Logits
    differ in rounding. Batches are filled up to one size, so that nothing is compiled twice.

    :param network: in evaluation mode; changing its weights afterwards has no effect
    :param batch_size: images of a forward pass, at most
    """

    def __init__(self, network: torch.nn.Module, batch_size: int = 16):
        super().__init__()
        self.network, self.batch_size = network, batch_size
        self._compiled = torch.compile(network, options={"freezing": True}, dynamic=False)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        filled = images.new_zeros(self.batch_size, *images.shape[1:]).contiguous(memory_format=torch.channels_last)
        filled[: len(images)] = images
        return self._compiled(filled)[: len(images)]
