"""Certificates by randomized smoothing, for any classifier."""

from arq_env.certification.bounds import clopper_pearson_lower, smoothing_radius
from arq_env.certification.certificates import ABSTAINED, Certificates
from arq_env.certification.smoothing import certify

__all__ = ["ABSTAINED", "Certificates", "certify", "clopper_pearson_lower", "smoothing_radius"]
