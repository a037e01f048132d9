"""Certificates by randomized smoothing, for any classifier."""

from arq_env.certification.bounds import (
    betting_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    randomized_clopper_pearson_lower,
    smoothing_radius,
)
from arq_env.certification.cache import PredictionCache, cache_predictions
from arq_env.certification.certificates import ABSTAINED, Certificates
from arq_env.certification.compiled import CompiledNetwork
from arq_env.certification.counting import Cohen, Randomized
from arq_env.certification.digest import network_digest
from arq_env.certification.grid import GridNoise
from arq_env.certification.method import Method, Request
from arq_env.certification.methods import METHODS
from arq_env.certification.replaying import Incremental, Paired
from arq_env.certification.sequential import Sequential
from arq_env.certification.smoothing import certify, estimate_seconds
from arq_env.certification.soft import soft_radius, softmax_entropy

__all__ = [
    "ABSTAINED",
    "METHODS",
    "Certificates",
    "Cohen",
    "CompiledNetwork",
    "GridNoise",
    "Incremental",
    "Method",
    "Paired",
    "PredictionCache",
    "Randomized",
    "Request",
    "Sequential",
    "betting_lower",
    "cache_predictions",
    "certify",
    "clopper_pearson_lower",
    "clopper_pearson_upper",
    "estimate_seconds",
    "network_digest",
    "randomized_clopper_pearson_lower",
    "smoothing_radius",
    "soft_radius",
    "softmax_entropy",
]
