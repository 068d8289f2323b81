"""Make `import torchvision` work beside a CPU-only torch, and set the environment our dependencies read at import.

The Linux torchvision wheel is built for CUDA. Next to a CPU build of torch its compiled operators do not load, and
`import torchvision` then fails with "operator torchvision::nms does not exist", taking timm and diffusers along.
Nothing here calls those operators, so declaring their schemas is enough. Where torchvision works, nothing is done.
"""

import importlib.abc
import importlib.util
import os
import sys
import warnings

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations asks the network for its version otherwise
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost up to 26x beside another process
warnings.filterwarnings("ignore", message="Failed to load image Python extension")

_declared = None  # keeps the schema library alive


def _operators_load() -> bool:
    import torch

    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    folder = spec.submodule_search_locations[0]
    libraries = [name for name in os.listdir(folder) if name.startswith("_C") and name.endswith((".so", ".pyd"))]
    try:
        for name in libraries:
            torch.ops.load_library(os.path.join(folder, name))
    except OSError:
        return False
    return True


def declare_missing_operators() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` when the compiled library cannot be loaded."""
    import torch

    global _declared
    if _declared is not None or hasattr(torch.ops.torchvision, "nms") or _operators_load():
        return
    _declared = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, so that nothing else waits for torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_missing_operators()
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
