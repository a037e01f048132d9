"""Mixed-precision quantization that keeps certified robustness, as a Gymnasium environment.

Importing this package registers its environments; see :mod:`arq_env.registration` for the ids.
"""

from arq_env.registration import register_all
from arq_env.support.errors import ArqError

#: The one place: setup.cfg and every provenance take it from here.
__version__ = "0.3.0"
__all__ = ["ArqError", "load"]

register_all()


def load(path, base=None):
    """A file for deployment as a classifier that :func:`arq_env.certification.certify` takes, known there by its content.

    :param path: a run folder of finalize.py, its ``network.safetensors``, a packed file, or an ONNX file, this package's or not
    :param base: for weights of a network of one's own: a network of the same structure
    :return: a torch module in evaluation mode; for ONNX a function from images to logits, with an attribute ``digest``
    :raises ArqError: when the file is missing, damaged, or not to be trusted; nothing in it is unpickled
    """
    from arq_env.export.loading import load_with_card

    return load_with_card(path, base)[0]
