"""Image harmonization: DiffHarmony++ and region-wise contrastive learning, reproduced."""

import importlib
from typing import TYPE_CHECKING

from .core import torchvision_guard  # noqa: F401  (first: it makes torchvision importable beside a CPU-only torch)

if TYPE_CHECKING:  # what type checkers see of `_PUBLIC`
    from .core.errors import HarmonyError as HarmonyError
    from .evaluation.metrics import score as score
    from .inference import compose as compose
    from .inference import harmonize as harmonize
    from .models.classifier import HarmonyClassifier as HarmonyClassifier
    from .models.contrastive import RegionContrastiveLoss as RegionContrastiveLoss
    from .models.pipeline import DiffHarmonyPipeline as DiffHarmonyPipeline
    from .models.pipeline import PromptEmbedding as PromptEmbedding
    from .models.refinement import RefinementUNet as RefinementUNet
    from .models.resunet import ContrastiveResUNet as ContrastiveResUNet
    from .models.vae import HarmonyVAE as HarmonyVAE

__version__ = "0.1.0"

_PUBLIC = {
    "compose": "inference",
    "harmonize": "inference",
    "score": "evaluation.metrics",
    "HarmonyVAE": "models.vae",
    "DiffHarmonyPipeline": "models.pipeline",
    "PromptEmbedding": "models.pipeline",
    "RefinementUNet": "models.refinement",
    "ContrastiveResUNet": "models.resunet",
    "RegionContrastiveLoss": "models.contrastive",
    "HarmonyClassifier": "models.classifier",
    "HarmonyError": "core.errors",
}
__all__ = list(_PUBLIC)


if not TYPE_CHECKING:  # a checker that saw this would let any name pass

    def __getattr__(name):
        """Load public names on first use, so that `import harmonylib` is quick."""
        if name not in _PUBLIC:
            raise AttributeError(f"module 'harmonylib' has no attribute {name!r}")
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
