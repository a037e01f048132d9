"""The radius of the soft smoothed classifier, estimated: little noise in it, so it tells similar networks apart."""

import numpy as np
import torch
from scipy import stats

from arq_env.errors import ArqError

#: Images whose noise is drawn together; fixed, so that the noise does not depend on the device.
IMAGES_AT_ONCE = 32
#: Mean probabilities are kept this far from 0 and 1, where the radius would be infinite.
MARGIN = 1e-4


@torch.inference_mode()
def soft_radius(network, images, labels, *, sigma: float, n: int, seed: int = 0) -> np.ndarray:
    """Within which radius the class of the highest mean softmax is the label's: sigma / 2 (Phi^-1(p_y) - Phi^-1(max p_c)).

    p is the mean of the softmax over Gaussian noise. For the exact mean the radius is a certificate (Salman et al. 2019; Zhai et
    al. 2020, whose training maximises it); from n samples it is an estimate, for comparing networks and not to quote. A label
    either counts or not, a softmax moves with every change of the network: on the same few samples this radius ranks maps
    more reliably than counted labels do (``experiments/rank_maps.py``). It also grows with the scale of the logits, so compare
    only networks made from one.

    :param network: torch module in evaluation mode, from images [b, c, h, w] to logits [b, classes]
    :param images: float tensor [n, c, h, w] in [0, 1]
    :param labels: [n] whole numbers
    :param sigma: standard deviation of the noise, in units of pixels in [0, 1]
    :param n: noise samples an image; the same for every network with the same ``seed``
    :return: float64 [n], in the units of the pixels; negative where another class is ahead
    :raises ArqError: for NaN or infinite logits
    """
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    means = []
    for part in images.split(IMAGES_AT_ONCE):
        noisy = part.cpu() + sigma * torch.randn((n, *part.shape), generator=generator)
        noisy = noisy.flatten(0, 1).to(device, memory_format=torch.channels_last)
        size = IMAGES_AT_ONCE if device.type == "cpu" else len(noisy)  # larger batches overflow a CPU's caches
        logits = torch.cat([network(batch) for batch in noisy.split(size)]).float()
        means.append(logits.softmax(1).unflatten(0, (n, len(part))).mean(0))
    mean = torch.cat(means).double().cpu().numpy()
    if not np.isfinite(mean).all():
        raise ArqError("the network gave NaN or infinite logits: no radius can be estimated")
    rows, mean = np.arange(len(mean)), np.clip(mean, MARGIN, 1 - MARGIN)
    own = mean[rows, labels]
    mean[rows, labels] = 0
    return sigma / 2 * (stats.norm.ppf(own) - stats.norm.ppf(mean.max(1)))
