"""Transparency kept through to the result: soft masks, cut-outs laid on a background, and steady frames."""

import cv2
import numpy as np
import odd
import pytest
from conftest import COLOUR, save_resunet
from PIL import Image

import harmonylib as hl
from harmonylib.core.placing import place
from harmonylib.inference import find_change, open_scene, recolored
from harmonylib.tools import cli, harmonize_files

BACKGROUND = np.asarray(odd.photo(96, 72, seed=3))
ALPHA = np.zeros((24, 32), np.uint8)
ALPHA[2:22, 2:30], ALPHA[6:18, 6:26] = 128, 255
ALPHA[3, 3:20] = 7
CUT = odd.layers(np.asarray(odd.photo(seed=5)), ALPHA)


@pytest.fixture(scope="module", params=["colour", "residual"])
def net(request, tmp_path_factory):
    """A random ResUNet with either head: one colour map, or one and a rest by place."""
    folder = tmp_path_factory.mktemp("net")
    return save_resunet(folder, **COLOUR, map_std=1.0) if request.param == "colour" else save_resunet(folder)


def levels_off(after, front, back, alpha):
    """How far `after` is from `front` over `back`, in levels."""
    weight = alpha[..., None] / 255.0
    return np.abs(after - (weight * front + (1 - weight) * back)).max()


def test_levels_of_a_mask_blend(net):
    mask = np.zeros((72, 96), np.uint8)
    mask[20:52, 30:70], mask[24:48, 36:64] = 100, 255
    mask[60, :] = 3  # far outside the window that the model sees of a small foreground
    before = BACKGROUND.astype(float)
    hard = np.asarray(hl.harmonize(BACKGROUND, mask > 127, model=net, device="cpu"))
    after = np.asarray(hl.harmonize(BACKGROUND, mask, model=net, device="cpu"))
    assert np.array_equal(after[mask == 0], BACKGROUND[mask == 0])
    assert np.array_equal(after[mask == 255], hard[mask == 255])  # levels up to 127 are no foreground to the model
    scene = open_scene(BACKGROUND, mask)
    changed = recolored(scene.colours, mask > 0, *find_change(scene, net, device="cpu"), 1.0)
    assert levels_off(after, changed, before, mask) <= 0.5 and (after[mask == 100] != BACKGROUND[mask == 100]).any()


def test_a_jpeg_is_a_mask_without_levels(net, tmp_path):
    mask = Image.fromarray(np.pad(ALPHA[6:18, 6:26], ((20, 40), (30, 46))))
    mask.save(tmp_path / "mask.jpg", quality=60)
    read = np.asarray(Image.open(tmp_path / "mask.jpg"))
    assert ((read > 0) & (read < 100)).any()  # noise around the edge
    after = np.asarray(hl.harmonize(BACKGROUND, tmp_path / "mask.jpg", model=net, device="cpu"))
    assert np.array_equal(after[read < 128], BACKGROUND[read < 128])


def test_compose_blends_by_alpha():
    after = np.asarray(hl.compose(BACKGROUND, CUT, at=(50, -4)))
    layer = np.zeros((72, 96, 4), np.uint8)
    layer[:20, 50:82] = np.asarray(CUT)[4:]
    assert np.array_equal(after[layer[..., 3] == 0], BACKGROUND[layer[..., 3] == 0])
    assert levels_off(after, layer[..., :3].astype(float), BACKGROUND, layer[..., 3]) <= 0.5
    centred = np.asarray(hl.compose(BACKGROUND, CUT))
    assert np.array_equal(centred, np.asarray(hl.compose(BACKGROUND, CUT, at=(32, 24))))


def test_the_cut_outs_own_colours_are_harmonized(net):
    """One colour on a black and white ground: its half transparent edge shows no other colour than its inside does."""
    ground = np.zeros((72, 96, 3), np.uint8)
    ground[:, ::2] = 255
    cut = odd.layers((140, 90, 60), ALPHA)
    after = np.asarray(hl.compose(ground, cut, at=(20, 30), harmonized=True, model=net, device="cpu")).astype(float)
    layer = np.asarray(place(cut, (96, 72), (20, 30)))[..., 3]
    assert np.array_equal(after[layer == 0], ground[layer == 0])
    inside = after[layer == 255]
    assert np.abs(inside - [140, 90, 60]).max() > 2
    edge = (after - (1 - layer[..., None] / 255) * ground)[layer == 128] / (128 / 255)
    # one map takes one colour to one; the residual head's change varies by place
    spread = 1.1 if np.ptp(inside, axis=0).max() == 0 else 1.1 + np.ptp(inside, axis=0).max()
    assert (edge > inside.min(0) - spread).all() and (edge < inside.max(0) + spread).all()


def test_scaled_and_turned_without_a_fringe():
    """The colours of transparent pixels (here green) never show."""
    colours = np.where(ALPHA[..., None] > 0, (200, 40, 120), (0, 255, 0))
    cut = odd.layers(colours, ALPHA // 128 * 127 + ALPHA // 255)
    for scale, angle in ((0.4, 0), (1, 30), (2.3, -75)):
        layer = np.asarray(place(cut, (96, 72), None, scale, angle)).astype(int)
        seen = layer[..., 3] > 8
        assert seen.any() and np.abs(layer[seen][:, :3] - [200, 40, 120]).max() <= 1
    turned = np.asarray(place(CUT, (40, 40), (4, 8), 1, 90))  # about its centre, counter-clockwise
    right = np.rot90(np.where(ALPHA[..., None] > 0, np.asarray(CUT), 0))
    assert np.array_equal(turned[4:36, 8:32], right) and turned[..., 3].sum() == ALPHA.sum()


def test_compose_command(tmp_path, net, capsys):
    Image.fromarray(BACKGROUND).save(tmp_path / "ground.png")
    CUT.save(tmp_path / "cut.png")
    paths = [str(tmp_path / name) for name in ("ground.png", "cut.png", "out.png", "net.png")]
    place_it = ["--at", "-3,5", "--scale", "1.5", "--angle", "20", "--device", "cpu", "--model", str(net)]
    assert cli.run(cli.app, "harmonylib", ["compose", *paths[:2], "-o", paths[2], *place_it]) == 0
    assert cli.run(cli.app, "harmonylib", ["compose", *paths[:2], "-o", paths[3], *place_it, "--harmonize"]) == 0
    options = {"at": (-3, 5), "scale": 1.5, "angle": 20, "device": "cpu", "model": net}
    for path, harmonized in zip(paths[2:], (False, True), strict=True):
        assert np.array_equal(
            np.asarray(Image.open(path)), np.asarray(hl.compose(*paths[:2], harmonized=harmonized, **options))
        )
    capsys.readouterr()
    for words, line in (
        (["cut.png", "cut.png"], "cut.png: has transparency; save it without"),
        (["ground.png", "ground.png"], "ground.png: has no transparency; give a cut-out"),
        (["ground.png", "cut.png", "--at", "1"], "--at 1: must be X,Y"),
        (["ground.png", "cut.png", "--at", "500,0"], "cut.png: nothing of it lies in the picture at 500,0"),
        (["ground.png", "cut.png", "--scale", "0"], "scale 0"),
        (["ground.png", "cut.png", "--scale", "1e4"], "320000x240000 on 96x72; use less"),
        (["ground.png", "cut.png", "--scale", "9", "--harmonize"], "all is foreground"),
    ):
        files = [str(tmp_path / word) if word.endswith("png") else word for word in words]
        assert cli.run(cli.app, "harmonylib", ["compose", *files, "-o", str(tmp_path / "bad.png")]) == 1
        told = capsys.readouterr().err
        assert line in told and told.count("\n") == 1 and not (tmp_path / "bad.png").exists()


def test_steady_frames(tmp_path, capsys, monkeypatch):
    """Twelve frames under a lamp that flickers: the colours of one object jump less, and each is what its map says."""
    monkeypatch.setattr(harmonize_files, "STEADY", 3.0)
    net, mask = save_resunet(tmp_path / "net", **COLOUR, map_std=1.0), np.zeros((24, 32), bool)
    mask[6:18, 8:24] = True
    for folder in ("frames", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        light = np.where(mask[..., None], 120, rng.integers(40, 216, (24, 32, 3)))
        Image.fromarray(light.astype(np.uint8)).save(tmp_path / f"frames/{number}.png")
        Image.fromarray(mask).save(tmp_path / f"masks/{number}.png")

    def run(frames, out, *words, masks="masks"):
        paths = [str(tmp_path / name) for name in (frames, masks, out)]
        words = [*paths[:2], "-o", paths[2], "--model", str(net), "--device", "cpu", *words]
        return cli.run(cli.app, "harmonylib", ["harmonize", *words])

    jumps = {}
    for out, words in (("plain", ()), ("steady", ("--steady",))):
        assert run("frames", out, *words) == 0
        frames = [np.asarray(Image.open(tmp_path / f"{out}/{number}.png")).astype(float) for number in range(12)]
        colours = np.array([frame[mask].mean(0) for frame in frames])
        jumps[out], jumps[out + " mean"] = np.abs(np.diff(colours, axis=0)).mean(), colours.mean(0)
        for number, frame in enumerate(frames):
            assert np.array_equal(frame[~mask], np.asarray(Image.open(tmp_path / f"frames/{number}.png"))[~mask])
    assert jumps["steady"] < 0.4 * jumps["plain"] and jumps["plain"] > 1
    assert np.abs(jumps["steady mean"] - jumps["plain mean"]).max() < 3
    jobs = harmonize_files.plan(tmp_path / "frames", tmp_path / "masks", tmp_path / "new", steady=True)
    assert [job.composite.stem for job in jobs] == [str(number) for number in range(12)]  # 2 before 10
    (tmp_path / "frames/5.png").write_bytes(b"x")
    capsys.readouterr()
    assert run("frames", "again", "--steady") == 1 and len(list((tmp_path / "again").iterdir())) == 11
    assert "1 of 12 pictures could not be" in capsys.readouterr().err
    assert run("frames/1.png", "one.png", "--steady", masks="masks/1.png") == 1
    assert "--steady takes a folder of frames" in capsys.readouterr().err


def write_video(path, frames):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"FFV1"), 12.5, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def test_video_files(tmp_path, capsys):
    net, mask = save_resunet(tmp_path / "net", **COLOUR, map_std=1.0), np.zeros((48, 64), np.uint8)
    mask[12:36, 16:48] = 255
    frames = [np.asarray(odd.photo(64, 48, seed)) for seed in range(11)]
    write_video(tmp_path / "clip.avi", frames)
    write_video(tmp_path / "masks.avi", [np.dstack([mask] * 3)] * 11)
    (tmp_path / "masks").mkdir()
    for number in range(11):
        Image.fromarray(mask).save(tmp_path / f"masks/{number}.png")

    def run(*names):
        paths = [str(tmp_path / name) for name in names]
        words = ["harmonize", *paths[:2], "-o", paths[2], "--model", str(net), "--device", "cpu"]
        return cli.run(cli.app, "harmonylib", words)

    assert run("clip.avi", "masks", "out.mkv") == run("clip.avi", "masks.avi", "frames") == 0
    reader = cv2.VideoCapture(str(tmp_path / "out.mkv"))
    assert reader.get(cv2.CAP_PROP_FPS) == 12.5
    for number, before in enumerate(frames):
        after = reader.read()[1][..., ::-1]
        assert np.array_equal(after, np.asarray(Image.open(tmp_path / f"frames/{number:06d}.png")))
        assert np.array_equal(after[mask == 0], before[mask == 0]) and (after[mask > 0] != before[mask > 0]).any()
    assert reader.read()[1] is None
    (tmp_path / "masks/10.png").unlink()
    (tmp_path / "bad.mp4").write_bytes(b"x")
    capsys.readouterr()
    for names, line in (
        (("clip.avi", "masks", "new.mkv"), "10 masks for 11 frames"),
        (("clip.avi", "masks.avi", "out.mkv"), "out.mkv: exists already"),
        (("clip.avi", "masks.avi", "new.webm"), "none of .mkv .avi"),
        (("bad.mp4", "masks.avi", "new.mkv"), "bad.mp4: not a readable video"),
    ):
        assert run(*names) == 1 and line in capsys.readouterr().err
    assert not list(tmp_path.glob("new*"))
