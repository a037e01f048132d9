"""Mixed-precision quantization that keeps certified robustness, as a Gymnasium environment.

Importing this package registers its environments; see :mod:`arq_env.registration` for the ids.
"""

from arq_env.registration import register_all
from arq_env.support.errors import ArqError

#: The one place: setup.cfg and every provenance take it from here.
__version__ = "0.3.0"
__all__ = ["ArqError"]

register_all()
