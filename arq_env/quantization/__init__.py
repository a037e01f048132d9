"""Quantization for certification: from a network and a bit-width map to a quantized network."""

from arq_env.quantization.convert import Quantizer

__all__ = ["Quantizer"]
