"""Random draws seeded by purpose: (profile seed, stage, image, mask, candidate), never by order of execution."""

import hashlib

import numpy as np


def seed_for(*purpose) -> int:
    """A 63-bit seed that depends only on the words given, for example ``seed_for(0, "generate", "a0002", 3)``."""
    text = "\x1f".join(str(part) for part in purpose)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(*purpose) -> np.random.Generator:
    """A numpy generator for one purpose."""
    return np.random.default_rng(seed_for(*purpose))


def generator(*purpose):
    """A torch.Generator for one purpose (on the CPU, so that noise is the same whatever the device)."""
    import torch  # here: what draws with numpy alone does without its import

    return torch.Generator().manual_seed(seed_for(*purpose))
