"""The certifier alone, on a classifier that knows nothing of this package: here the nearest mean image, in NumPy."""

import argparse

import numpy as np

from arq_env.certification import certify
from arq_env.datasets import load_dataset


def main(images, n):
    signs = load_dataset("signs")  # embedded; uint8 [n, height, width, 3]
    train, labels = signs.train.images.astype(np.float32) / 255, signs.train.labels
    means = np.stack([train[labels == label].mean(0) for label in np.unique(labels)])  # [classes, height, width, 3]

    def nearest_mean(batch):
        """float32 [b, 3, height, width] -> class [b]: all that certify asks of a classifier."""
        values = np.asarray(batch).transpose(0, 2, 3, 1).reshape(len(batch), -1)
        centres = means.reshape(len(means), -1)
        return (values @ centres.T - (centres**2).sum(1) / 2).argmax(1)

    chosen = slice(None, None, max(1, len(signs.test.images) // images))
    certificates = certify(
        nearest_mean,
        signs.test.images[chosen].transpose(0, 3, 1, 2).astype(np.float32) / 255,
        signs.test.labels[chosen],
        sigma=0.5,
        n=n,
    )
    print(f"{len(certificates)} images: ACR {certificates.acr:.3f}, clean accuracy {certificates.clean_accuracy:.3f}")
    for radius in (0.25, 0.5, 1.0):
        print(f"right and certified at radius {radius}: {certificates.certified_accuracy(radius):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--n", type=int, default=1_000, help="noise samples that count a class, for each image")
    main(**vars(parser.parse_args()))
