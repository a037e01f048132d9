"""Noisy copies of images and what a classifier makes of them."""

from collections.abc import Callable

import numpy as np
import torch

from arq_env.errors import ArqError
from arq_env.files import sha256

#: Independent noise streams of an image: to select a class, to count it, to count it apart from a cache's counts, and
#: the uniform draws of a randomized bound.
SELECTION, ESTIMATION, DRAW, FRESH = range(4)
#: Copies of an image whose predictions are held at a time.
BLOCK = 1_024


class Sampler:
    """Draws noise for a few images and asks the classifier; an image's noise follows from the seed and its own pixels.

    So neither batch size nor the images beside it change what the classifier is asked about an image. Each stream goes on
    where the last call left it.

    :param images: float32 [b, ...] in [0, 1]
    :param indices: [b], what to call them in error messages
    """

    def __init__(self, classifier: Callable, images, indices, *, sigma: float, seed: int, batch_size: int, device):
        self.classifier, self.indices, self.sigma, self.seed, self.batch_size = classifier, indices, sigma, seed, batch_size
        self.device = device
        self.digests = [sha256(np.ascontiguousarray(image)) for image in images]
        self._channels_last = images.ndim == 4
        self._keep_layout = _reads_channels_last(classifier)
        self._images = np.ascontiguousarray(np.moveaxis(images, 1, -1)) if self._channels_last else images
        self._streams = {}

    def __len__(self) -> int:
        return len(self._images)

    def stream(self, purpose: int, row: int) -> np.random.Generator:
        """The generator of one image's noise for one purpose."""
        if (purpose, row) not in self._streams:
            seed = [self.seed, purpose, int(self.digests[row], 16)]
            self._streams[purpose, row] = np.random.Generator(np.random.SFC64(seed))
        return self._streams[purpose, row]

    def select(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The class that ``n`` noisy copies of each image get most often, the smallest at a tie, and how often."""
        votes = [np.bincount(row) for row in self.predict(SELECTION, n)]
        return np.array([v.argmax() for v in votes]), np.array([v.max() for v in votes])

    def count(self, purpose: int, n: int, classes, rows=None) -> np.ndarray:
        """How many of ``n`` further noisy copies get the class given for their image: int64 [rows]."""
        counts = np.zeros(len(classes), np.int64)
        for start in range(0, n, BLOCK):
            counts += (self.predict(purpose, min(BLOCK, n - start), rows) == np.asarray(classes)[:, None]).sum(1)
        return counts

    def predict(self, purpose: int, n: int, rows=None) -> np.ndarray:
        """Predicted classes of ``n`` further noisy copies of each image, batches running on across images.

        :param rows: which images, all by default
        :return: int64 [rows, n]
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        predictions = np.empty(len(rows) * n, np.int64)
        images = self._images
        for start in range(0, len(predictions), self.batch_size):
            places = np.arange(start, min(start + self.batch_size, len(predictions))) // n
            noisy = np.empty((len(places), *images.shape[1:]), np.float32)
            for place in range(places[0], places[-1] + 1):
                here = slice(*np.searchsorted(places, (place, place + 1)))
                self.stream(purpose, rows[place]).standard_normal(out=noisy[here], dtype=np.float32)
            noisy *= np.float32(self.sigma)
            noisy += images[rows[places]]
            batch = np.moveaxis(noisy, -1, 1) if self._channels_last else noisy
            batch = batch if self._keep_layout else np.ascontiguousarray(batch)
            predictions[start : start + len(places)] = self._classes(batch, rows[places])
        return predictions.reshape(len(rows), n)

    @torch.inference_mode()
    def _classes(self, batch: np.ndarray, rows) -> np.ndarray:
        """Run the classifier on one batch: int64 [b]."""
        output = self.classifier(batch if self.device is None else torch.from_numpy(batch).to(self.device))
        if isinstance(output, torch.Tensor):
            output = output.float().cpu().numpy() if output.is_floating_point() else output.cpu().numpy()
        output = np.asarray(output)
        logits = output.ndim == 2 and output.shape[1] > 1
        labels = output.ndim == 1 and (not np.isfinite(output).all() or np.issubdtype(output.dtype, np.integer))
        if not (logits or labels) or len(output) != len(batch):
            raise ArqError(
                f"the classifier gave {output.dtype} of shape {output.shape} for {len(batch)} images: it must give logits "
                "[b, classes] of two classes or more, or whole numbers [b] as labels"
            )
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        if not finite.all():
            raise ArqError(
                f"the classifier gave NaN or infinite output for noisy copies of image {self.indices[rows[~finite][0]]}: "
                "nothing is certified for it"
            )
        if labels and output.min() < 0:
            raise ArqError(f"the classifier gave label {output.min()}: labels are whole numbers from 0")
        return output.astype(np.int64) if labels else output.argmax(axis=1)


def _reads_channels_last(classifier: Callable) -> bool:
    """Whether a module's convolutions are laid out channels-last, which their batches then are too (faster on a CPU)."""
    parameters = classifier.parameters() if isinstance(classifier, torch.nn.Module) else ()
    kernels = [p for p in parameters if p.dim() == 4 and min(p.shape[1], p.shape[2] * p.shape[3]) > 1]
    return bool(kernels) and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
