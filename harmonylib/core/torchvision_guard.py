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
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations asks the network for its version otherwise
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads cost up to 26x beside another process
warnings.filterwarnings("ignore", message="Failed to load image Python extension")


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Declares the operators when torchvision is about to be imported, so that nothing else waits for torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            self.declare_missing_operators(importlib.util.find_spec(name))
        return None

    def declare_missing_operators(self, torchvision) -> None:
        import torch

        try:
            for folder in torchvision.submodule_search_locations if torchvision else ():
                for library in [*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")]:
                    torch.ops.load_library(library)
        except OSError:
            self.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_finder = _BeforeTorchvision()  # kept, since what its library declares lasts as long as it does
sys.meta_path.insert(0, _finder)
