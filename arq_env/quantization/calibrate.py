"""What calibration images tell: the range of activations, and BatchNorm's statistics under quantization."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

#: Values kept of each layer's input, over all calibration images.
SAMPLES = 2**14
BATCH = 128


@torch.inference_mode()
def sample_activations(network: nn.Module, names: list[str], images: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values of each named layer's input, from forward passes in evaluation mode.

    :param images: float [n, c, h, w], noisy
    :return: for each name, at most 16,384 values with the smallest and the largest among them
    """
    generator = torch.Generator().manual_seed(seed)
    batches = images.split(BATCH)
    each = -(-SAMPLES // len(batches))
    samples = {name: [] for name in names}

    def keep(name):
        def hook(module, inputs):
            values = inputs[0].flatten()
            chosen = torch.randint(len(values), (min(each, len(values)),), generator=generator)
            extremes = torch.stack(values.aminmax())
            samples[name].append(torch.cat([values[chosen.to(values.device)], extremes]))

        return hook

    modules = dict(network.named_modules())
    hooks = [modules[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        for batch in batches:
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in samples.items()}


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, images: torch.Tensor) -> None:
    """Replace BatchNorm's running statistics by their mean over batches of ``images``, in place; other modules stay as they are.

    The images must look like those the network was trained on: noisy, and cropped and flipped the same way.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # torch then keeps the plain average over batches
        module.train()
    for batch in images.split(BATCH):
        network(batch)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        module.eval()
