"""The packages of the extra ``export``, in one place, so that a missing one is one sentence."""

from arq_env.support.errors import ArqError, reason

try:
    import onnx
    import onnx.inliner
    import onnx.shape_inference
    import onnxruntime
    import onnxscript  # noqa: F401  (torch's exporter needs it)
except ImportError as error:
    raise ArqError(f"ONNX needs packages that are not installed ({reason(error)}): pip install 'arq-env[export]'") from error

__all__ = ["CARD", "onnx", "onnxruntime"]

#: The entry of a file's metadata that holds its card, as JSON.
CARD = "arq"
