"""What calibration images tell: the range of activations, and BatchNorm's statistics under quantization."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arq_env.layers import Layer
from arq_env.quantization.exact import exact_means
from arq_env.support.batches import batch_size
from arq_env.support.errors import ArqError

#: Values kept of each layer's input, over all calibration images.
SAMPLES = 2**14
BATCH = 128


class Activations(NamedTuple):
    """Sampled inputs of a layer: ``values`` [n], and ``weights`` [n], how many activations each stands for."""

    values: torch.Tensor
    weights: torch.Tensor


@torch.inference_mode()
def sample_activations(
    network: nn.Module, layers: tuple[Layer, ...], images: torch.Tensor, seed: int = 0
) -> dict[str, Activations]:
    """Random values of each layer's input, from forward passes in evaluation mode.

    :param images: float [n, c, h, w], noisy
    :return: for each name about 16,384 values and the extremes of each batch, which stand for themselves alone
    :raises ArqError: naming the layer, where activations are not finite, or a layer is not called as often as
        :func:`arq_env.layers.find_layers` saw: then what the network computes depends on the image
    """
    generator = torch.Generator().manual_seed(seed)
    batches = even_batches(images)
    samples: dict[str, list[Activations]] = {layer.name: [] for layer in layers}
    each = -(-SAMPLES // len(batches))

    def keep(name):
        def hook(module, args, kwargs):
            values = (args[0] if args else kwargs["input"]).flatten()
            chosen = torch.randint(len(values), (min(each, len(values)),), generator=generator)
            extremes = torch.stack(values.aminmax())
            if not extremes.isfinite().all():
                raise ArqError(f"layer {name!r} reads NaN or infinite activations: the network does not work on these images")
            weights = torch.full((len(chosen) + 2,), len(values) / len(chosen))
            weights[-2:] = 1
            samples[name].append(Activations(torch.cat([values[chosen.to(values.device)], extremes]), weights.to(values.device)))

        return hook

    modules = dict(network.named_modules())
    hooks = [modules[layer.name].register_forward_pre_hook(keep(layer.name), with_kwargs=True) for layer in layers]
    try:
        for done, batch in enumerate(batches, start=1):
            network(batch)
            for layer in layers:
                if len(samples[layer.name]) != done * layer.calls:
                    raise ArqError(
                        f"layer {layer.name!r} was called {layer.calls} times for an image of noise, and otherwise for "
                        "calibration images: a network whose path depends on the image has no fixed cost and cannot be quantized"
                    )
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Activations(*map(torch.cat, zip(*parts, strict=True))) for name, parts in samples.items()}


def even_batches(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Batches of at most 128 images, fewer of large ones, whose sizes differ by one at most, so that each may count alike."""
    return images.tensor_split(-(-len(images) // batch_size(images[0].numel(), BATCH)))


@torch.no_grad()
def reestimate_batch_norm(network: nn.Module, images: torch.Tensor) -> None:
    """Replace BatchNorm's running statistics by their mean over batches of ``images``, in place; other modules stay as they are.

    The images must look like those the network was trained on: noisy, and cropped and flipped the same way. A BatchNorm that
    no image reaches keeps its statistics.

    :raises ArqError: for fewer than two images
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    if len(images) < 2:
        raise ArqError(f"BatchNorm's statistics cannot be estimated on {len(images)} calibration images: give at least 2")
    before = [{name: buffer.clone() for name, buffer in module.named_buffers()} for module in norms]
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # torch then keeps the plain average over batches
        module.train()
    with exact_means():
        for batch in even_batches(images):
            network(batch)
    for module, momentum, buffers in zip(norms, momenta, before, strict=True):
        module.momentum = momentum
        module.eval()
        if not module.num_batches_tracked:
            module.load_state_dict(buffers, strict=False)
