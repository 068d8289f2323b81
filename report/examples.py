"""`python -m report.examples`: the files of examples/ and README's picture, made of photos that come with packages.

examples/: a composite with its mask, and a cut-out with the background it is for. docs/before_after.jpg: what the
shipped weights do to composites of the test photos: of DRAWS by each recipe the one of median gain, so that nothing is
picked.
"""

import io
import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

import harmonylib as hl
from harmonylib.core.files import atomic_path
from harmonylib.data.embedded_photos import load_photos
from harmonylib.data.recipes import make_composite
from harmonylib.evaluation import figures

ROOT = Path(__file__).parents[1]
PARTS = {"coffee": "cup", "china": "pagoda", "grace_hopper": "person"}  # the test photos, and what is recoloured
RECIPES, DRAWS = ("HCOCO", "HAdobe5k", "HFlickr", "Hday2night"), 4
SOFT = 1.0  # pixels over which the cut-out's edge fades


def median_draw(photo, reference) -> dict:
    """A composite of the photo, its mask, and what the default model makes of it; "errors" is fMSE before and after."""
    mask, draws = photo.masks[PARTS[photo.name]], []
    for recipe, number in itertools.product(RECIPES, range(DRAWS)):
        picture, _ = make_composite(recipe, photo.image, mask, (number, "examples", photo.name), reference)
        harmonized = np.asarray(hl.harmonize(picture, mask))
        before, after = (hl.score(image, photo.image, mask, "standard")["fmse"] for image in (picture, harmonized))
        draws.append({"composite": picture, "mask": mask, "harmonized": harmonized, "errors": (before, after)})
    return sorted(draws, key=lambda draw: draw["errors"][1] / draw["errors"][0])[len(draws) // 2]


def cutout(photo, part: str) -> Image.Image:
    """The part alone, RGBA, cropped; its alpha falls over SOFT pixels."""
    alpha = Image.fromarray(photo.masks[part].astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(SOFT))
    image = Image.fromarray(photo.image)
    image.putalpha(alpha)
    return image.crop(alpha.getbbox())


def before_after(photos, draws) -> Image.Image:
    rows = [[draw["composite"], draw["harmonized"], photo.image] for photo, draw in zip(photos, draws, strict=True)]
    errors = [draw["errors"] for draw in draws]
    titles = [[f"composite, fMSE {a:.0f}", f"harmonized, fMSE {b:.0f}", "real photo"] for a, b in errors]
    figure, file = figures.image_grid(rows, titles, size=3.4), io.BytesIO()
    heights = [photo.image.shape[0] / photo.image.shape[1] for photo in photos]  # else a wide row stands in empty space
    figure.axes[0].get_gridspec().set_height_ratios(heights)
    figure.set_figheight(3.8 * sum(heights))
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    return Image.open(file).convert("RGB")


def write(path: Path, image: Image.Image) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, optimize=True, **{"quality": 88} if path.suffix == ".jpg" else {})


def main() -> None:
    figures.style()
    photos = {photo.name: photo for photo in load_photos()}
    flower = photos["flower"]  # a colour transfer takes its colours
    draws = [median_draw(photos[name], (flower.image, flower.masks["flower"])) for name in PARTS]
    folder = ROOT / "examples"
    write(folder / "composite.jpg", Image.fromarray(draws[0]["composite"]))
    write(folder / "mask.png", Image.fromarray(draws[0]["mask"].astype(np.uint8) * 255))
    write(folder / "cutout.png", cutout(photos["astronaut"], "person"))
    write(folder / "background.jpg", Image.fromarray(photos["rocket"].image))
    write(ROOT / "docs/before_after.jpg", before_after([photos[name] for name in PARTS], draws))


if __name__ == "__main__":
    main()
