"""Several maps of one network certified on the same test images with the same noise, so that their differences are paired."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from arq_env.bitwidths import BitWidthMap, bops_fraction, check_map
from arq_env.certification import Certificates, Cohen, certify
from arq_env.certification.chunks import no_progress
from arq_env.evaluation import Evaluator
from arq_env.layers import Layer
from arq_env.problem import Problem
from arq_env.quantization import model_bytes
from arq_env.support.files import sha256
from arq_env.support.provenance import provenance
from arq_env.support.settings import TestSettings

#: Name of the network that is not quantized.
FP32 = "FP32"


@dataclass(frozen=True)
class Comparison:
    """Certificates of FP32 and of each map.

    :param certificates: name to table, FP32 first
    :param maps: name to map, without FP32
    """

    settings: TestSettings
    layers: tuple[Layer, ...]
    maps: dict[str, BitWidthMap]
    certificates: dict[str, Certificates]

    def bops_fraction(self, name: str) -> float:
        """BOPs of one of the networks as a fraction of FP32's."""
        return bops_fraction(self.maps[name], self.layers) if name in self.maps else 1.0

    def difference(self, a: str, b: str) -> tuple[float, float]:
        """ACR of ``a`` minus ACR of ``b``, and the standard error of this paired difference."""
        return paired_difference(self.certificates[a], self.certificates[b])

    def with_network(self, name: str, bit_widths: BitWidthMap, certificates: Certificates) -> "Comparison":
        """One network more, certified on the same images with the same settings."""
        return replace(self, maps=self.maps | {name: bit_widths}, certificates=self.certificates | {name: certificates})

    def document(self, evaluator: Evaluator) -> dict:
        """Everything as plain data for JSON, with what is needed to redo it."""
        card, (base, *_) = evaluator.problem.card, self.maps
        return {
            "images": len(self.certificates[FP32]),
            "settings": asdict(self.settings),
            "sigma": evaluator.problem.sigma,
            "networks": {
                name: summarize(table)
                | {
                    "bops_fraction": self.bops_fraction(name),
                    "model_bytes": model_bytes(evaluator.problem.network, self.layers, self.maps.get(name)),
                }
                for name, table in self.certificates.items()
            },
            "acr_differences": {
                f"{a} - {b}": dict(zip(("mean", "standard_error"), self.difference(a, b), strict=True))
                for b in (FP32, base)
                for a in self.maps
                if a != b
            },
            "maps": {name: {layer: list(bits) for layer, bits in bits_of.items()} for name, bits_of in self.maps.items()},
            "checkpoint": card.get("digest"),
            "provenance": provenance(),
        }


def compare_maps(
    evaluator: Evaluator,
    maps: dict[str, BitWidthMap],
    settings: TestSettings,
    *,
    folder: Path | None = None,
    map: Callable = map,
    progress: Callable[[str], Callable] = lambda name: no_progress,
) -> Comparison:
    """Certify FP32 and each map on the test images.

    :param folder: where each table is kept, image by image; what is already there, for the same network, map and settings,
        is not made again
    :param map: as for :func:`arq_env.certification.certify`
    :param progress: called with a name, returns the ``progress`` of :func:`arq_env.certification.certify`
    """
    problem = evaluator.problem
    for chosen in maps.values():
        check_map(chosen, problem.layers)
    certificates = {}
    for name, bit_widths in {FP32: None, **maps}.items():
        path = None if folder is None else table_path(folder, name, bit_widths, evaluator, settings)
        network = problem.network if bit_widths is None else evaluator.quantizer.quantize(bit_widths)
        certificates[name] = certify_on_test_images(problem, network, settings, map=map, progress=progress(name), log=path)
    return Comparison(settings, problem.layers, maps, certificates)


def table_path(folder: Path, name: str, bit_widths: BitWidthMap | None, evaluator: Evaluator, settings: TestSettings) -> Path:
    """Where :func:`compare_maps` keeps the table of a map, None being FP32: its name tells all that it depends on."""
    problem = evaluator.problem
    images, labels = problem.test_images(settings.every, settings.offset)
    data = [sha256(np.ascontiguousarray(array)) for array in (images, labels)]
    identity = [bit_widths, asdict(settings), problem.sigma, problem.digest, evaluator.settings.seed, data]
    return Path(folder) / f"{name}-{sha256(json.dumps(identity).encode())[:12]}.tsv"


def certify_on_test_images(
    problem: Problem,
    network: torch.nn.Module,
    settings: TestSettings,
    *,
    skip_wrong: bool = True,
    log: Path | None = None,
    map: Callable = map,
    progress: Callable = no_progress,
) -> Certificates:
    """Certify a network made from ``problem.network`` for a report.

    :param network: quantized, fine-tuned, compiled or as it is
    :param skip_wrong: as for :class:`arq_env.certification.Cohen`; the figures of a report are the same either way
    :param log, map, progress: as for :func:`arq_env.certification.certify`
    """
    images, labels = problem.test_images(settings.every, settings.offset)
    return certify(
        network,
        images,
        labels,
        sigma=problem.sigma,
        n0=settings.n0,
        n=settings.n,
        alpha=settings.alpha,
        seed=settings.seed,
        method=Cohen(skip_wrong),
        map=map,
        progress=progress,
        log=log,
    )


def paired_difference(a: Certificates, b: Certificates) -> tuple[float, float]:
    """Mean over images of a's certified radius minus b's, and its standard error."""
    difference = a.certified_radius - b.certified_radius
    return float(difference.mean()), standard_error(difference)


def paired_ratio(a: Certificates, b: Certificates) -> tuple[float, float]:
    """a's ACR over b's, and its standard error to first order."""
    return ratio_of_means(a.certified_radius, b.certified_radius)


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mean of a over mean of b, each [images], with its standard error (the ratio estimator's; Cochran 1977, section 6.3)."""
    ratio = float(a.mean() / b.mean())
    return ratio, standard_error(a - ratio * b) / float(b.mean())


def lower_bound(mean: float, error: float) -> float:
    """With 95% confidence the true value is larger: what shows that one network is not worse than another by more than a margin."""
    return mean - float(stats.norm.ppf(0.95)) * error


def standard_error(values: np.ndarray) -> float:
    """Standard error of a mean over images; infinite for a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def summarize(certificates: Certificates) -> dict:
    """ACR with its standard error, clean accuracy, and certified accuracy at radii in steps of 0.25."""
    radii = np.arange(0.25, 3.25, 0.25)
    return {
        "acr": certificates.acr,
        "acr_standard_error": standard_error(certificates.certified_radius),
        "clean_accuracy": certificates.clean_accuracy,
        "certified_accuracy": {f"{radius:g}": certificates.certified_accuracy(radius) for radius in radii},
    }
