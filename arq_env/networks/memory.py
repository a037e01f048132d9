"""How many images of a training step go through a network at once."""

import torch
from torch import nn

from arq_env.networks.checkpoints import copy_network

#: Bytes that backpropagation may keep of what goes through a network at once: one number, not what the machine at hand has, since
#: BatchNorm in training sees the images that go through together.
KEPT_BYTES = 2**32


def images_at_once(network: nn.Module, image_shape: tuple[int, ...], batch: int) -> int:
    """``batch``, or as many images as let backpropagation keep at most 4 GiB, but two.

    :param image_shape: of one image, [c, h, w]
    """
    device = next(network.parameters()).device
    two, four = (kept_bytes(network, torch.zeros(count, *image_shape, device=device)) for count in (2, 4))
    image = max(1, (four - two) // 2)
    return min(batch, max(2, (KEPT_BYTES - (two - 2 * image)) // image))


def kept_bytes(network: nn.Module, images: torch.Tensor) -> int:
    """Bytes that a training pass on these images keeps for backpropagation, besides the network."""
    copied = copy_network(network).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*copied.parameters(), *copied.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that nothing else gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.random.fork_rng():
        torch.manual_seed(0)
        copied(images).sum()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)
