"""The radius of the soft smoothed classifier, estimated: little noise in it, so it tells similar networks apart."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from scipy import optimize, stats

from arq_env.certification.inputs import (
    MOST_SEED,
    checked_classifier,
    checked_labels,
    checked_pixels,
    checked_sigma,
    device_of,
    real,
    shown,
    whole,
)
from arq_env.certification.sampling import as_output, call
from arq_env.support.batches import batch_size
from arq_env.support.errors import ArqError

#: Images whose noise is drawn together; fixed, so that the noise does not depend on the device.
IMAGES_AT_ONCE = 64
#: Mean probabilities are kept this far from 0 and 1, where the radius would be infinite.
MARGIN = 1e-4
#: Logits are multiplied by no less and no more than these to reach an entropy.
SCALES = (0.01, 100.0)
#: Most noisy images in all, and most noise values drawn together (8 GiB).
MOST_SAMPLES, MOST_VALUES = 10**8, 2**31


def soft_radius(network, images, labels, *, sigma: float, n: int, seed: int = 0, entropy: float | None = None) -> np.ndarray:
    """Within which radius the class of the highest mean softmax is the label's: sigma / 2 (Phi^-1(p_y) - Phi^-1(max p_c)).

    p is the mean of the softmax over Gaussian noise. For the exact mean the radius is a certificate (Salman et al. 2019; Zhai et
    al. 2020, whose training maximises it); from n samples it is an estimate, for comparing networks and not to quote. A label
    either counts or not, a softmax moves with every change of the network: on the same few samples this radius ranks maps
    more reliably than counted labels do (``experiments/studies/rank_maps.py``).

    It also grows with the scale of the logits, which changes no label and no certificate by counted labels: a network wins by
    being surer of itself. ``entropy`` takes that away: all logits are multiplied by the one number with which the softmax has this
    mean entropy (temperature scaling, Guo et al. 2017, fitted to a level of confidence instead of labels).

    :param network: torch module in evaluation mode, from images [b, c, h, w] to logits [b, classes]
    :param images: [n, c, h, w] in [0, 1], a tensor or an array
    :param labels: [n] whole numbers, each a class of the network's; none is unknown
    :param sigma: standard deviation of the noise, in units of pixels in [0, 1]
    :param n: noise samples an image, from 1; the same for every network with the same ``seed``
    :param entropy: mean entropy to compare at, in nats, such as :func:`softmax_entropy` of the network to compare with; None
        takes the logits as they are
    :return: float64 [n], in the units of the pixels; negative where another class is ahead
    :raises ArqError: for arguments out of range, for anything but finite logits of two classes or more, and for labels that these
        do not have
    """
    pixels = checked_pixels(images)
    labels = checked_labels(labels, len(pixels), unknown=False)
    if entropy is not None:
        entropy = real("entropy", entropy, lambda value: value >= 0, "a mean entropy in nats, not negative")
    return radius_of_logits(noisy_logits(network, images, sigma=sigma, n=n, seed=seed), labels, sigma=sigma, entropy=entropy)


def radius_of_logits(logits: torch.Tensor, labels: np.ndarray, *, sigma: float, entropy: float | None = None) -> np.ndarray:
    """The radii of :func:`soft_radius` from what :func:`noisy_logits` gives, float64 [images]."""
    if labels.max() >= logits.shape[-1]:
        raise ArqError(f"there is a label {labels.max()} and logits of {logits.shape[-1]} classes: labels count from 0")
    sigma = checked_sigma(sigma)
    if entropy is not None:
        logits = logits * scale_for_entropy(logits, entropy)
    mean = logits.softmax(-1).mean(1).numpy()
    rows, mean = np.arange(len(mean)), np.clip(mean, MARGIN, 1 - MARGIN)
    own = mean[rows, labels]
    mean[rows, labels] = 0
    return sigma / 2 * (stats.norm.ppf(own) - stats.norm.ppf(mean.max(1)))


def softmax_entropy(network, images, *, sigma: float, n: int, seed: int = 0) -> float:
    """How unsure a network is: the mean entropy of its softmax, in nats, on the noise that :func:`soft_radius` draws.

    :raises ArqError: for arguments out of range, and for anything but finite logits of two classes or more
    """
    return mean_entropy(noisy_logits(network, images, sigma=sigma, n=n, seed=seed))


def noisy_copies(images, *, sigma: float, n: int, seed: int) -> Iterator[torch.Tensor]:
    """n noisy copies of each image, a few images at a time: float32 [n, few, c, h, w], the same bits on every processor.

    :raises ArqError: for arguments out of range
    """
    sigma, n, seed = checked_sigma(sigma), whole("n", n, 1, MOST_SAMPLES), whole("seed", seed, 0, MOST_SEED)
    images = torch.from_numpy(np.array(checked_pixels(images), order="C"))
    if images.dim() != 4:
        raise ArqError(f"images have shape {tuple(images.shape)}: give them as [n, c, h, w]")
    if len(images) * n > MOST_SAMPLES or images[:IMAGES_AT_ONCE].numel() * n > MOST_VALUES:
        raise ArqError(
            f"n is {n:,} for {len(images):,} images of shape {tuple(images.shape[1:])}: give a smaller n or fewer images"
        )
    generator = np.random.Generator(np.random.SFC64(seed))  # torch's draws differ from processor to processor
    for part in images.split(IMAGES_AT_ONCE):
        noise = torch.from_numpy(generator.standard_normal((n, *part.shape), np.float32))
        noisy = noise.mul_(sigma).add_(part)
        yield noisy.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (n, len(part)))


def noisy_logits(network, images, *, sigma: float, n: int, seed: int) -> torch.Tensor:
    """What a network says of n noisy copies of each image, float64 [images, n, classes] on the CPU.

    :raises ArqError: where that is NaN or infinite, for anything but logits, and for arguments out of range
    """
    return logits_of_copies(network, noisy_copies(images, sigma=sigma, n=n, seed=seed))


@torch.inference_mode()
def logits_of_copies(network, copies: Iterable[torch.Tensor]) -> torch.Tensor:
    """What a network says of what :func:`noisy_copies` gives, as :func:`noisy_logits`."""
    checked_classifier(network)
    if not isinstance(network, torch.nn.Module):
        raise ArqError(f"network is {shown(network)}: give a torch module, which is what a soft radius is estimated for")
    device = device_of(network)
    parts = []
    for noisy in copies:
        images = noisy.flatten(0, 1).to(device)
        most = IMAGES_AT_ONCE if device.type == "cpu" else len(images)  # larger batches overflow a CPU's caches
        size = batch_size(images[0].numel(), most)
        logits = torch.cat([_logits(network, batch) for batch in images.split(size)])
        parts.append(logits.double().cpu().unflatten(0, noisy.shape[:2]).transpose(0, 1))
    logits = torch.cat(parts)
    if not logits.isfinite().all():
        raise ArqError("the network gave NaN or infinite logits: no radius can be estimated")
    return logits


def _logits(network, batch) -> torch.Tensor:
    """A network's logits for one batch, [b, classes]."""
    output = call(network, batch)
    logits = as_output(output, len(batch))
    if logits.ndim != 2 or not isinstance(output, torch.Tensor):
        raise ArqError(
            f"the network gave {logits.dtype} of shape {logits.shape}: a soft radius needs a tensor of logits [b, classes]"
        )
    return output


def scale_for_entropy(logits: torch.Tensor, entropy: float) -> float:
    """The number within ``SCALES`` by which to multiply logits for this mean entropy, or the end of ``SCALES`` nearer to it.

    The entropy falls as the number grows, so there is but one.
    """

    def excess(scale: float) -> float:
        return mean_entropy(scale * logits) - entropy

    low, high = SCALES
    if excess(low) <= 0:
        return low
    return high if excess(high) >= 0 else optimize.brentq(excess, low, high)


def mean_entropy(logits: torch.Tensor) -> float:
    """Of the softmax over the last axis, in nats."""
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy().mean().item()
