"""The browser app: its answers to a plain client, and the page itself in headless Chromium, from upload to download."""

import asyncio
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import odd
import pytest
from conftest import COLOUR, save_resunet
from PIL import Image
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

import harmonylib as hl
from harmonylib.core.errors import HarmonyError
from harmonylib.tools import app

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """photo.png, mask.png (as a cut-out: cut.png; of another size: small.png) and a random
    ResUNet in toy/, which takes one colour to one."""
    root = tmp_path_factory.mktemp("app")
    ramp = np.linspace(0, 200, 320)[None, :, None] + np.arange(200)[:, None, None] / 5 + [0, 10, 15]
    Image.fromarray(ramp.astype(np.uint8)).save(root / "photo.png")
    mask = np.zeros((200, 320), np.uint8)
    mask[50:150, 100:220] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(mask[::2, ::2]).save(root / "small.png")
    odd.layers((9, 9, 9), mask).save(root / "cut.png")
    save_resunet(root / "toy", **COLOUR, map_std=1.0)
    return root


@pytest.fixture(scope="module")
def address(folder):
    """The URL of the real command, run as a process of its own in an empty folder."""
    (folder / "cwd").mkdir()
    command = [sys.executable, "-m", "harmonylib.tools.cli", "app", "--port", "0", "--no-browser", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1", "TMPDIR": str(folder / "cwd")}
    command += ["--model", str(folder / "toy")]
    process = subprocess.Popen(command, cwd=folder / "cwd", env=environment, stdout=subprocess.PIPE, text=True)
    yield re.search(r"http://\S+/", process.stdout.readline())[0]
    process.terminate()
    process.wait(20)
    assert not list((folder / "cwd").iterdir())  # uploads never reach the disk


def fetch(url, data=None, **headers):
    """(status, body) of a GET, or a POST of `data`."""
    request = urllib.request.Request(url, data, {name.replace("_", "-"): value for name, value in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def post(address, files, **fields):
    """The JSON lines and the file of an upload."""
    parts = [(f'name="{name}"', str(value).encode()) for name, value in fields.items()]
    parts += [(f'name="{name}"; filename="{path.name}"', path.read_bytes()) for name, path in files.items()]
    body = b"".join(b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (h.encode(), d) for h, d in parts)
    status, answer = fetch(f"{address}harmonize", body + b"--x--\r\n", Content_Type="multipart/form-data; boundary=x")
    lines = []
    while answer and not (lines and "bytes" in lines[-1]):
        line, _, answer = answer.partition(b"\n")
        lines.append(json.loads(line))
    return status, lines, answer


def check_change(before, after, region):
    """Only the region changed."""
    before, after, region = (np.asarray(Image.open(file)) for file in (before, after, region))
    assert np.array_equal(before[region < 128], after[region < 128])
    assert not np.array_equal(before[region > 127], after[region > 127])


@pytest.mark.parametrize("mask", ["mask.png", "cut.png"])
def test_upload_to_download(address, folder, mask):
    status, lines, data = post(
        address, {"picture": folder / "photo.png", "mask": folder / mask}, model="toy", strength=1
    )
    assert status == 200 and lines[-1] == {"name": "photo-harmonized.png", "type": "image/png", "bytes": len(data)}
    stages = [line.get("stage") for line in lines[:-1]]
    assert stages == ["waiting", "reading", "loading the model", "harmonizing", "saving"]
    check_change(folder / "photo.png", io.BytesIO(data), folder / "mask.png")


def test_bad_uploads_are_one_line(address, folder):
    picture, mask = folder / "photo.png", folder / "mask.png"
    for files, fields, words in (
        ({"picture": picture}, {}, "no mask was sent"),
        ({"picture": picture, "mask": folder / "toy/config.json"}, {}, "config.json: not a readable image"),
        ({"picture": picture, "mask": folder / "small.png"}, {}, "160x100 but the picture is 320x200"),
        ({"picture": picture, "mask": mask}, {"model": "/etc"}, "'/etc' is not offered"),
        ({"picture": picture, "mask": mask}, {"strength": "much"}, "must be numbers"),
        ({"picture": picture, "mask": mask}, {"kind": "gif"}, "kind 'gif'"),
        ({"picture": picture, "cutout": folder / "cut.png"}, {}, "must be X,Y"),
        ({"picture": picture, "cutout": mask}, {"at": "1,2"}, "the cut-out: has no transparency"),
    ):
        status, lines, _ = post(address, files, **{"model": "toy", **fields})
        assert status == 200 and words in lines[-1]["error"]
    Image.new("1", (10_000, 5_000)).save(folder / "large.png")
    _, lines, _ = post(address, {"picture": folder / "large.png", "mask": mask}, model="toy")
    assert "50 megapixels" in lines[-1]["error"]


def odd_files(folder, number):
    """`number` pairs of an odd picture, or of one cut off or empty, and an odd mask."""
    masks = [odd.region(24, 24), odd.region(24, 24) & False, odd.region(24, 24) | True]
    masks = [odd.layers(colour, mask) for mask in masks for colour in ((0, 0, 0), (255, 255, 255), (200, 9, 9))]
    for seed in range(number):
        name, data = odd.odd_picture(seed)
        data = [data, data, data, data[: len(data) // 2], data[:9], b""][seed % 6]
        mask = odd.encoded(masks[seed % len(masks)])[: 50 if seed % 11 == 10 else None]
        files = {"picture": folder / name, "mask": folder / f"mask{seed}.png"}
        for path, part in zip(files.values(), (data, mask), strict=True):
            path.write_bytes(part)
        yield files


def test_odd_uploads_leave_it_serving(address, folder, tmp_path):
    """Each gets a picture or one line, and the queue is as free as before. ODD_UPLOADS: how many (50)."""
    made = 0
    for files in odd_files(tmp_path, int(os.environ.get("ODD_UPLOADS", 50))):
        status, lines, data = post(address, files, model="toy", strength=1)
        assert status == 200 and ("\n" not in lines[-1].get("error", "") if "error" in lines[-1] else data)
        made += bool(data)
    assert made > 3
    _, lines, data = post(address, {"picture": folder / "photo.png", "mask": folder / "mask.png"}, model="toy")
    assert lines[-1]["bytes"] == len(data)


def from_here(routes, ask, *words, **options):
    """What `ask(address, …)` returns of an app that this process serves."""

    async def serve():
        sockets = bind_sockets(0, "127.0.0.1")
        HTTPServer(routes).add_sockets(sockets)
        address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
        return await asyncio.to_thread(ask, address, *words, **options)

    return asyncio.run(serve())


def test_what_is_no_error_of_ours_frees_the_queue(folder, monkeypatch):
    def broken(*words, **options):
        raise SystemError("two\nlines")

    monkeypatch.setattr(app, "harmonize", broken)
    routes = app.application("127.0.0.1", [folder / "toy"], "cpu")
    files = {"picture": folder / "photo.png", "mask": folder / "mask.png"}
    for _ in range(app.MAX_WAITING + 1):
        _, lines, _ = from_here(routes, post, files, model="toy")
        assert lines[-1] == {"error": "SystemError: two lines"} and not routes.settings["waiting"]


@pytest.mark.parametrize(
    ("host", "origins", "asked", "status"),
    [
        ("127.0.0.1", [], {"Host": "a.example", "Origin": "https://a.example"}, 403),
        ("127.0.0.1", ["https://A.example/"], {"Host": "a.example", "Origin": "https://a.example"}, 200),
        ("127.0.0.1", ["https://a.example"], {"Origin": "https://a.example"}, 200),
        ("127.0.0.1", ["https://a.example"], {"Host": "a.example", "Origin": "https://evil.example"}, 403),
        ("127.0.0.1", ["https://a.example"], {"Host": "evil.example", "Origin": "https://a.example"}, 403),
        ("0.0.0.0", ["https://a.example"], {"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ("0.0.0.0", [], {"Host": "10.0.0.5", "Origin": "http://10.0.0.5"}, 200),
    ],
)
def test_origins_behind_a_proxy(folder, host, origins, asked, status):
    routes = app.application(host, [folder / "toy"], "cpu", origins)
    assert from_here(routes, lambda address: fetch(f"{address}setup", **asked)[0]) == status


def test_an_origin_that_is_none(folder):
    with pytest.raises(HarmonyError, match="--origin a.example: must be .* https://HOST"):
        app.application("127.0.0.1", [folder / "toy"], "cpu", ["a.example"])


def test_only_its_own_page_may_ask(address):
    assert fetch(address)[0] == fetch(address, Origin=address[:-1])[0] == 200
    assert fetch(address, Host="evil.example")[0] == 403
    assert fetch(f"{address}harmonize", b"", Origin="http://evil.example")[0] == 403
    assert fetch(f"{address}examples/none/mask")[0] == 404 and fetch(f"{address}../app.py")[0] in (403, 404)
    status, _ = fetch(f"{address}harmonize", b"", Content_Length=str(app.MAX_BYTES + 1))
    assert status == 400


def test_examples(address):
    offered = json.loads(fetch(f"{address}setup")[1])
    assert offered["models"][0] == "toy" and len(offered["examples"]) >= 3
    for name in offered["examples"]:
        files = (fetch(f"{address}examples/{quote(name)}/{part}")[1] for part in ("picture", "mask"))
        assert len({Image.open(io.BytesIO(file)).size for file in files}) == 1


@pytest.fixture
def page(browser, address):
    """The open page; at the end it must have asked for nothing but its own address and logged no error."""
    page, asked, logged = browser.new_page(viewport={"width": 1280, "height": 860}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.goto(address)
    yield page
    assert not logged and all(url.startswith((address, "blob:")) for url in asked)
    page.close()


def downloaded(page, path):
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(path)
    return download.value.suggested_filename


def test_page_with_odd_files_and_then_a_good_one(page, folder, tmp_path):
    for files in odd_files(tmp_path, 50):
        for part, path in (("#picture", files["picture"]), ("#mask-file", files["mask"])):
            page.set_input_files(part, path)
            page.wait_for_timeout(20)
        if page.is_enabled("#go"):
            page.click("#go")
            page.wait_for_selector("#compare:visible, #error:visible")
    test_page_with_files(page, folder, tmp_path)


def test_page_with_files(page, folder, tmp_path):
    held = []  # the page does not know its models yet
    page.route("**/setup", lambda route: held.append(route))
    page.reload()
    page.set_input_files("#picture", folder / "photo.png")
    page.set_input_files("#mask-file", folder / "mask.png")
    page.click("#go")
    held[0].continue_()
    page.wait_for_selector("#compare:visible")
    assert downloaded(page, tmp_path / "out.png") == "photo-harmonized.png"
    check_change(folder / "photo.png", tmp_path / "out.png", folder / "mask.png")
    page.fill("#compare", "20")
    assert page.eval_on_selector("#after", "e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 20%)"
    page.click("#edit")
    page.set_input_files("#mask-file", folder / "small.png")
    page.wait_for_selector("#fit:visible")
    page.click("#go")
    page.wait_for_selector("#error:visible")
    assert 'small.png is 160 × 100: another size; tick "Resize' in page.inner_text("#error")
    page.check("#fit-mask")
    page.click("#go")
    page.wait_for_selector("#compare:visible")


def test_page_with_a_drawn_mask(page, folder, tmp_path):
    page.set_input_files("#picture", folder / "photo.png")
    page.wait_for_selector("#mask:visible")
    assert page.is_disabled("#go")
    box = page.locator("#mask").bounding_box()
    corners = [(0.25, 0.25), (0.75, 0.25), (0.75, 0.75), (0.25, 0.75)]
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point, steps=4)
    page.mouse.up()
    page.click("[data-tool=eraser]")  # one dab in the middle
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.click("#go")
    page.wait_for_selector("#compare:visible")
    downloaded(page, tmp_path / "out.png")
    before, after = (np.asarray(Image.open(path)) for path in (folder / "photo.png", tmp_path / "out.png"))
    changed = (before != after).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert np.abs(np.array([rows[0], rows[-1], columns[0], columns[-1]]) - [50, 150, 80, 240]).max() <= 3
    assert not changed[99:102, 159:162].any() and changed.sum() > 0.5 * 100 * 160


def test_page_with_a_cut_out(page, folder, tmp_path):
    """Dragged, harmonized, downloaded: the pixels are those of `compose` there, its half transparent rim is blended."""
    alpha = np.full((60, 80), 128, np.uint8)
    alpha[:8], alpha[20:40, 20:60] = 0, 255
    odd.layers((150, 60, 90), alpha).save(folder / "layer.png")
    page.set_input_files("#picture", folder / "photo.png")
    page.wait_for_selector("#mask:visible")
    page.set_input_files("#cutout-file", folder / "layer.png")
    page.wait_for_selector("#placing:visible")
    page.select_option("#model", "toy")
    box = page.locator("#mask").bounding_box()
    pixel = box["width"] / 320  # of the picture, on the screen
    page.mouse.move(box["x"] + 160 * pixel, box["y"] + 100 * pixel)  # its centre, where it is laid first
    page.mouse.down()
    page.mouse.move(box["x"] + 230 * pixel, box["y"] + 60 * pixel, steps=4)
    page.mouse.up()
    after = {}
    for name, scale, angle in (("moved", 0, 0), ("turned", 25, 30)):
        page.fill("#scale", str(scale))
        page.fill("#angle", str(angle))
        page.click("#go")
        page.wait_for_selector("#download:visible")
        assert downloaded(page, tmp_path / f"{name}.png") == "photo-harmonized.png"
        after[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
        width, height = round(80 * 2 ** (scale / 50)), round(60 * 2 ** (scale / 50))
        where = {"at": (round(230 - width / 2), round(60 - height / 2)), "scale": 2 ** (scale / 50), "angle": angle}
        same = hl.compose(folder / "photo.png", folder / "layer.png", **where, harmonized=True, model=folder / "toy")
        assert np.array_equal(after[name], np.asarray(same))
        page.click("#edit")
    before = np.asarray(Image.open(folder / "photo.png")).astype(int)
    layer = np.zeros((200, 320), np.uint8)
    layer[30:90, 190:270] = alpha
    assert np.array_equal(after["moved"][layer == 0], before[layer == 0])
    (inside,) = np.unique(after["moved"][layer == 255], axis=0)  # of one colour, harmonized
    rim = inside * (128 / 255) + before[layer == 128] * (127 / 255)
    assert np.abs(inside - [150, 60, 90]).max() > 2 and np.abs(after["moved"][layer == 128] - rim).max() <= 1
    page.click("#cutout-clear")
    assert page.is_disabled("#go") and page.is_hidden("#placing")


def test_page_on_a_phone_with_an_example(page):
    page.set_viewport_size({"width": 390, "height": 844})
    page.click("#examples button >> nth=0")
    page.wait_for_selector("#go:enabled")
    page.click("#go")
    page.wait_for_selector("#download:visible")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
