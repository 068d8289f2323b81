"""Table 2's control: as many extra composites as the inverse model gave, made by the recipes of the data set itself."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from harmonylib.core.seeds import rng
from harmonylib.data.layout import Triple, write_composite
from harmonylib.data.recipes import EDITS, RecipeSettings, make_composite


def recipe_extras(triples: list[Triple], count: int, root, recipes: RecipeSettings, seed: int) -> list[Triple]:
    """`count` more composites of the triples' (real, mask) pairs, by their subset's recipe, below `root`.

    Pairs take turns; a transfer takes its colours from another pair of the list. What stood at `root` is removed.
    """
    shutil.rmtree(root, ignore_errors=True)
    pairs, extras = list({triple.pair: triple for triple in triples}.values()), []
    for number in range(count):
        triple, variant = pairs[number % len(pairs)], f"x{number // len(pairs)}"
        _, mask, real = triple.load()
        words = (seed, "control", *triple.pair, variant)
        others = [other for other in pairs if other.photo != triple.photo] or pairs
        colours = None if triple.subset in EDITS else partial(_colours_of_another, others, words)
        composite, _ = make_composite(triple.subset, real, mask, words, colours, recipes)
        line = write_composite(root, triple.subset, triple.mask.stem, variant, composite)
        extras.append(replace(triple, name=Path(line).stem, composite=Path(root, line)))
    return extras


def _colours_of_another(others: list[Triple], words: tuple, attempt: int):
    """(real, mask) of a triple that seeded words choose."""
    _, mask, real = others[int(rng(*words, "reference", attempt).integers(len(others)))].load()
    return real, mask
