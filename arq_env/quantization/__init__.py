"""Quantization for certification: from a network and a bit-width map to a quantized network."""

from arq_env.quantization.convert import Quantizer
from arq_env.quantization.files import load_quantized, model_bytes, save_quantized
from arq_env.quantization.integer import integer_network

__all__ = ["Quantizer", "integer_network", "load_quantized", "model_bytes", "save_quantized"]
