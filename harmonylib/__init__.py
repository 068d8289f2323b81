"""Image harmonization: DiffHarmony++ and region-wise contrastive learning, reproduced."""

import importlib

from .core import torchvision_guard  # noqa: F401  (first: it makes torchvision importable beside a CPU-only torch)

__version__ = "0.1.0"

_PUBLIC = {
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


def __getattr__(name):
    """Load public names on first use, so that `import harmonylib` is quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'harmonylib' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *_PUBLIC})
