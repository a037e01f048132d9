"""Noisy copies of images and what a classifier makes of them."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from arq_env.certification.grid import GridTable
from arq_env.certification.inputs import MOST_LABEL, as_array, first_line
from arq_env.support.errors import ArqError
from arq_env.support.files import sha256

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
    :param grid: draws the noise, for images on its grid; None for float32 noise
    """

    def __init__(
        self,
        classifier: Callable,
        images,
        indices,
        *,
        sigma: float,
        seed: int,
        batch_size: int,
        device,
        grid: GridTable | None = None,
    ):
        self.classifier, self.indices, self.sigma, self.seed, self.batch_size = classifier, indices, sigma, seed, batch_size
        self.device, self.grid = device, grid
        self.digests = [sha256(np.ascontiguousarray(image)) for image in images]
        self._channels_last = images.ndim == 4
        self._keep_layout = _reads_channels_last(classifier)
        self._images = np.ascontiguousarray(np.moveaxis(images, 1, -1)) if self._channels_last else images
        self._streams: dict[tuple[int, int], np.random.Generator] = {}

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
        selected, most = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        for row, predictions in enumerate(self.predict(SELECTION, n)):
            classes, votes = np.unique(predictions, return_counts=True)
            selected[row], most[row] = classes[votes.argmax()], votes.max()
        return selected, most

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
        for start in range(0, len(predictions), self.batch_size):
            places = np.arange(start, min(start + self.batch_size, len(predictions))) // n
            noisy = self._noisy(purpose, places, rows)
            batch = np.moveaxis(noisy, -1, 1) if self._channels_last else noisy
            batch = batch if self._keep_layout else np.ascontiguousarray(batch)
            predictions[start : start + len(places)] = self._classes(batch, rows[places])
        return predictions.reshape(len(rows), n)

    def _noisy(self, purpose: int, places, rows) -> np.ndarray:
        """The next noisy copies of the images ``rows[places]``, float32."""
        noise = np.empty((len(places), *self._images.shape[1:]), np.float32 if self.grid is None else np.int32)
        for place in range(places[0], places[-1] + 1):
            here, stream = slice(*np.searchsorted(places, (place, place + 1))), self.stream(purpose, rows[place])
            if self.grid is None:
                stream.standard_normal(out=noise[here], dtype=np.float32)
            else:
                noise[here] = self.grid.draw(stream, noise[here].shape)
        if self.grid is not None:
            return self.grid.noisy(self._images[rows[places]], noise)
        noise *= np.float32(self.sigma)
        noise += self._images[rows[places]]
        return noise

    @torch.inference_mode()
    def _classes(self, batch: np.ndarray, rows) -> np.ndarray:
        """Run the classifier on one batch: int64 [b]."""
        given = batch if self.device is None else torch.from_numpy(batch).to(self.device)
        output = as_output(call(self.classifier, given), len(batch))
        labels = output.ndim == 1
        finite = np.isfinite(output).reshape(len(output), -1).all(axis=1)
        if not finite.all():
            raise ArqError(
                f"the classifier gave NaN or infinite output for noisy copies of image {self.indices[rows[~finite][0]]}: "
                "nothing is certified for it"
            )
        if labels and not 0 <= output.min() <= output.max() <= MOST_LABEL:
            bad = output.min() if output.min() < 0 else output.max()
            raise ArqError(f"the classifier gave label {bad}: labels are whole numbers from 0 to {MOST_LABEL:,}")
        return output.astype(np.int64) if labels else output.argmax(axis=1)


def call(classifier: Callable, batch):
    """What a classifier says of a batch.

    :raises ArqError: where torch fails in a module, in one sentence with torch's own words
    """
    try:
        return classifier(batch)
    except RuntimeError as error:
        if not isinstance(classifier, torch.nn.Module):
            raise
        kinds = {str(p.dtype).removeprefix("torch.") for p in classifier.parameters() if p.is_floating_point()} - {"float32"}
        hint = f"convert its {' and '.join(sorted(kinds))} weights with float()" if kinds else "it gets float32 and no gradients"
        raise ArqError(f"the classifier failed on a batch of shape {tuple(batch.shape)} ({first_line(error)}): {hint}") from error


def as_output(output, images: int) -> np.ndarray:
    """A classifier's output as an array: logits [b, classes], or labels [b]; either may still hold NaN.

    :raises ArqError: for anything else
    """
    if isinstance(output, (tuple, Mapping)):
        raise ArqError(
            f"the classifier gave a {type(output).__name__} of {len(output)} entries: it must give logits [b, classes] or labels "
            "[b] alone, so wrap it in a torch module that returns that one of them"
        )
    if isinstance(output, torch.Tensor) and output.is_floating_point():
        output = output.float()
    output = as_array("the classifier's outputs", output)
    logits = output.ndim == 2 and output.shape[1] > 1
    labels = output.ndim == 1 and (not np.isfinite(output).all() or np.issubdtype(output.dtype, np.integer))
    if not (logits or labels) or len(output) != images:
        raise ArqError(
            f"the classifier gave {output.dtype} of shape {output.shape} for {images} images: it must give logits "
            "[b, classes] of two classes or more, or whole numbers [b] as labels"
        )
    return output


def _reads_channels_last(classifier: Callable) -> bool:
    """Whether a module's convolutions are laid out channels-last, which their batches then are too (faster on a CPU)."""
    if not isinstance(classifier, torch.nn.Module):
        return False
    # Kernels that were quantized may be buffers.
    held = (classifier.parameters(), classifier.buffers())
    kernels, codes = ([t for t in some if t.dim() == 4 and min(t.shape[1], t.shape[2] * t.shape[3]) > 1] for some in held)
    kernels = kernels or codes
    return bool(kernels) and all(t.is_contiguous(memory_format=torch.channels_last) for t in kernels)
