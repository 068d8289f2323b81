"""Generated inputs for everything that reads what others made: the only exceptions are `HarmonyError`s of one line.

FUZZ_INPUTS (500; `make fuzz`: 10,000) inputs are shared out evenly among the targets.
"""

import contextlib
import io
import math
import os
import string
from pathlib import Path

import numpy as np
import odd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nbformat import v4
from PIL import Image

from harmonylib.augmentation.candidates import read_candidates
from harmonylib.core.decoding import MASK_SOURCES, mask_levels
from harmonylib.core.errors import HarmonyError
from harmonylib.core.images import read_image, read_mask
from harmonylib.core.json_files import read_json, write_json
from harmonylib.core.picture_metadata import open_picture, write_picture
from harmonylib.core.settings import parse_yaml
from harmonylib.core.settings import settings as load_settings
from harmonylib.data.layout import read_triples
from harmonylib.data.readers import Runs
from harmonylib.evaluation.metrics import METRICS, PROTOCOLS, score
from harmonylib.tools.notebooks import check_parameters, parse_parameters, read_notebook

INPUTS = int(os.environ.get("FUZZ_INPUTS", 500))
TARGETS = []
REPOSITORY = Path(__file__).parents[1]


def target(*strategies):
    """Have the decorated function called with generated arguments."""

    def decorate(function):
        TARGETS.append((function, st.tuples(*strategies)))
        return function

    return decorate


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory):
    """The working directory of all targets, with the repository's profiles."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("dvc.yaml", "params.yaml"):
        (root / name).touch()
    (root / "profiles").symlink_to(REPOSITORY / "profiles")
    with contextlib.chdir(root):
        yield


# ---- pictures: damaged files of all kinds ----


KINDS = {
    "PNG": ("RGB", "RGBA", "L", "P", "1", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "TIFF": ("RGB", "RGBA", "L", "F", "I", "CMYK"),
    "BMP": ("RGB", "L", "1"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
}


@st.composite
def pictures(draw):
    """A file of a random kind, mode and size, whole or with some bytes changed and its end cut off."""
    kind = draw(st.sampled_from(list(KINDS)))
    mode = draw(st.sampled_from(KINDS[kind]))
    width, height = draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (height, width, 4), dtype=np.uint8)
    data = bytearray(odd.encoded(Image.fromarray(pixels).convert(mode), kind))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
        data[place] = value
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@target(st.one_of(pictures(), st.binary(max_size=200)), st.booleans())
def reads_a_picture(data, as_mask):
    Path("picture").write_bytes(data)
    array = (read_mask if as_mask else read_image)("picture")
    assert (array.ndim, array.dtype) == ((2, bool) if as_mask else (3, np.uint8)) and array.size


@target(st.integers(0, 10**9), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP"]))
def keeps_a_picture_with_odd_metadata(seed, kind):
    """EXIF, profiles, segments, chunks and tags: the picture comes back from every kind of file."""
    name, data = odd.odd_picture(seed)
    picture, file = open_picture(io.BytesIO(data), name), io.BytesIO()
    assert picture.size == (24, 24)
    write_picture(picture, file, kind, name)
    again = open_picture(file, name)
    assert again.size == picture.size
    assert kind == "JPEG" or np.array_equal(np.asarray(again), np.asarray(picture.convert(again.mode)))


LAYERS = st.sampled_from(["white", "black", "photo", "region", "other", "void", "noise"])


@target(
    st.sampled_from([*KINDS["TIFF"], "P", "1", "LA", "PA", "I;16", "LAB"]),
    LAYERS,
    LAYERS,
    st.sampled_from(MASK_SOURCES),
)
def reads_a_mask_of_any_mode(mode, colours, alpha, source):
    region, noise = odd.region(), np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8)
    layers = {"white": region | True, "black": region & False, "region": region, "other": region[::-1]}
    layers = {name: layer.astype(np.uint8) * 255 for name, layer in layers.items()} | {"noise": noise}
    layers["photo"] = np.asarray(odd.photo().convert("L"))
    layers["void"] = np.where(region[::-1], 255, region).astype(np.uint8)
    image = Image.merge("LA", [Image.fromarray(layers[colours]), Image.fromarray(layers[alpha])]).convert("RGBA")
    if mode in ("I", "I;16", "F", "P"):
        image = image.convert("L").convert(mode)
    image = image if mode == "RGBA" else Image.merge("LAB", image.split()[:3]) if mode == "LAB" else image.convert(mode)
    levels = mask_levels(image, "mask", source)
    assert levels.shape == (24, 32) and levels.dtype == np.uint8
    if colours == "region" and alpha == "white" and mode in ("RGBA", "LA", "L", "RGB", "I", "1") and source == "auto":
        assert np.array_equal(levels > 127, region)


# ---- lists, JSON ----

NAMES = ["HFlickr", "composite_images", "masks", "a_1_1.jpg", "a_1_1", "..", ".", "/", "\\", "\0", "\r\n", " ", "é"]
WORDS = st.sampled_from([*NAMES, "a" * 300])
OUTSIDE = ["../composite_images/a_1_1.jpg", "/composite_images/a_1_1.jpg", f"x/composite_images/{'a' * 300}_1_1.jpg"]
LINES = st.one_of(st.sampled_from(OUTSIDE), st.text(max_size=60), st.lists(WORDS, max_size=6).map("/".join))


@target(st.lists(LINES, max_size=4).map("\n".join), st.binary(max_size=2))
def reads_a_list(text, tail):
    for part in ("composite_images", "masks", "real_images"):  # beside the set: a list must not reach them
        Path(part).mkdir(exist_ok=True)
        for name in ("a_1_1.jpg", "a_1.jpg", "a.jpg"):
            Path(part, name).touch()
    Path("set").mkdir(exist_ok=True)
    Path("set/IHD_train.txt").write_bytes(text.encode("utf-8", "replace") + tail)
    triples = read_triples("set", "train")
    assert all(Path("set").resolve() in triple.composite.resolve().parents for triple in triples)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)


@target(JSON)
def writes_json_that_comes_back(value):
    write_json("value.json", value)
    again = read_json("value.json")
    write_json("again.json", again)
    assert Path("again.json").read_bytes() == Path("value.json").read_bytes()


@target(st.one_of(st.binary(max_size=60), JSON.map(lambda value: repr(value).encode("utf-8", "replace"))))
def reads_candidates(data):
    Path("manifest.json").write_bytes(data)
    read_candidates(".")


RUNS = st.one_of(
    st.text("0123456789 -²٣", max_size=30),
    st.lists(st.integers(-3, 80), max_size=6).map(lambda numbers: " ".join(map(str, numbers))),
    st.lists(st.integers(0, 2**70), max_size=4).map(lambda numbers: " ".join(map(str, numbers))),
)


@target(st.lists(RUNS, max_size=3), st.tuples(st.integers(1, 9), st.integers(1, 9)))
def decodes_run_lengths(texts, shape):
    mask = Runs(tuple(texts), shape, "train.csv").decode()
    assert mask.shape == shape and mask.dtype == bool


# ---- metrics ----


@st.composite
def images_to_score(draw):
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    flat = np.full_like(noise, rng.integers(0, 256))
    odd_ones = [rng.uniform(-20, 300, noise.shape), noise * np.nan, noise[..., 0], noise[:1], None]
    masks = [rng.random((height, width)), noise[..., 0], np.ones((height + 1, width), bool)]
    images = st.sampled_from([0, 1]) | st.integers(0, 6)
    pred, real = ([noise, flat, *odd_ones][draw(images)] for _ in range(2))
    mask = rng.random((height, width)) < draw(st.sampled_from([0, 0.1, 0.5, 1]))
    return pred, real, [mask, *masks][draw(st.just(0) | st.integers(0, 3))]


@target(images_to_score(), st.sampled_from([*PROTOCOLS, "other"]))
def scores(images, protocol):
    values = score(*images, protocol)
    assert set(METRICS) <= set(values)
    assert all(isinstance(value, float) for value in values.values())
    assert math.isnan(values["mse"]) or values["mse"] >= 0


# ---- settings and notebook parameters ----

PROFILE = (REPOSITORY / "profiles/mini.yaml").read_text(encoding="utf-8")


@st.composite
def profiles(draw):
    """The mini profile with some of its lines changed, doubled, dropped or moved."""
    lines = PROFILE.splitlines()
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        other = draw(st.one_of(st.sampled_from(lines), st.text(string.printable, max_size=20)))
        name, indent = lines[at].split(":")[0], " " * draw(st.integers(0, 4))
        changed = [[other], [other, lines[at]], [], [f"{name}: {other}"], [indent + lines[at]]]
        lines[at : at + 1] = draw(st.sampled_from(changed))
    return "\n".join(lines)


@target(st.one_of(profiles(), st.text(max_size=60)))
def loads_settings(text):
    Path("params.yaml").write_text(text, encoding="utf-8", errors="replace", newline="")
    assert load_settings().profile


@target(st.one_of(st.text(max_size=40), st.text("[]{}:,-&*!|>'\"%@`#? \n\ta1", max_size=40)))
def parses_yaml(text):
    parse_yaml(text, "text")


NOTEBOOK = v4.new_notebook(
    cells=[v4.new_code_cell("a = 1\nb = 'x'\nc = [1.0]\nd = None", metadata={"tags": ["parameters"]})]
)
VALUES = st.text(max_size=20) | st.sampled_from(["1", "1e-4", "true", "[1, 2]", "null", "{a: 1}", "2001-01-01"])


@target(st.lists(st.tuples(st.sampled_from("abcdx") | st.text(max_size=4), VALUES), max_size=3))
def parses_parameters(pairs):
    parameters = parse_parameters([f"{name}={text}" for name, text in pairs])
    check_parameters("n.ipynb", NOTEBOOK, parameters)


@target(st.one_of(st.binary(max_size=80), JSON.map(lambda value: repr(value).encode("utf-8", "replace"))))
def reads_a_notebook(data):
    Path("n.ipynb").write_bytes(data)
    read_notebook("n.ipynb")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's and ours, of odd pictures
@pytest.mark.parametrize(("function", "strategy"), TARGETS, ids=[function.__name__ for function, _ in TARGETS])
def test_nothing_but_clear_errors(function, strategy):
    @settings(
        max_examples=math.ceil(INPUTS / len(TARGETS)),
        derandomize=INPUTS <= 500,  # the same inputs in every CI run; others each time of `make fuzz`
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def call(arguments):
        try:
            function(*arguments)
        except HarmonyError as error:
            assert str(error).strip() and len(str(error).splitlines()) == 1, error

    call()
