"""Import torchvision also where its compiled operators are missing.

The torchvision wheel is built against one build of torch. Beside another (a CPU-only torch, say) its extension library
does not load, and the import itself fails because two operators have no schema to attach a shape rule to. The
data sets and model definitions need neither operator, so it is enough to declare them; calling one still fails.
"""

import importlib
import sys

MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[object] = []  # torch drops a declaration when its Library object dies


def import_torchvision():
    """Return the torchvision module, declaring its two NMS operators first where the import needs it."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in MISSING_SCHEMAS:
        library.define(schema)
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed attempt left half-initialised modules behind
    return importlib.import_module("torchvision")
