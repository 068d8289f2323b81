"""Random transforms of images and their mask together (albumentations); `images.to_square` is the fixed geometry.

Masks stay {0, 1}: they are always resized by nearest neighbour.
"""

import albumentations as A
import cv2
import numpy as np

from ..core.seeds import seed_for

cv2.setNumThreads(0)


def random_crop(size: int, scale=(0.5, 1.0)) -> A.Compose:
    """RandomResizedCrop to size x size (DiffHarmony's optional augmentation: area 0.5-1, ratio 3/4-4/3), flip."""
    crop = A.RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3),
                               interpolation=cv2.INTER_AREA, mask_interpolation=cv2.INTER_NEAREST)  # fmt: skip
    return A.Compose([crop, A.HorizontalFlip(p=0.5)], additional_targets={"real": "image"})


def apply(transform: A.Compose, seed_words: tuple, mask: np.ndarray, **images: np.ndarray) -> dict[str, np.ndarray]:
    """Apply one random draw, seeded by `seed_words`, to a bool mask and same-sized uint8 images.

    Returns the arrays by name with "mask" as bool. albumentations ignores numpy's global seed, hence the seeding here.
    """
    transform.set_random_seed(seed_for(*seed_words) % 2**32)
    names = list(images)
    call = {("image" if i == 0 else "real"): images[name] for i, name in enumerate(names)}
    out = transform(mask=mask.astype(np.uint8), **call)
    result = {name: out["image" if i == 0 else "real"] for i, name in enumerate(names)}
    return {**result, "mask": out["mask"] > 0}
