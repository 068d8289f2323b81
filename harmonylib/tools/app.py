"""The browser app: one page, served to this computer, that harmonizes a picture.

Uploads stay in memory and go with their request; nothing is logged, written or fetched. The page is `app_page/`.
"""

import asyncio
import contextlib
import errno
import functools
import io
import itertools
import json
import re
import threading
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import typer
from PIL import Image
from tornado import iostream, web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from ..core.devices import pick_device
from ..core.errors import HarmonyError
from ..core.picture_metadata import check_kind, open_picture, read_levels, write_picture
from ..core.placing import parse_place
from ..data.embedded_photos import load_photos
from ..data.recipes import make_composite
from ..inference import MODELS, compose, harmonize, load_model, model_folder

PAGE = Path(__file__).with_name("app_page")
MAX_BYTES = 64 * 2**20  # of a request: picture and mask together
MAX_PIXELS = 50_000_000
MAX_WAITING = 4  # requests; one runs at a time
STEPS = 5
KINDS = {"png": ("PNG", "image/png"), "jpg": ("JPEG", "image/jpeg")}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class _Handler(web.RequestHandler):
    """Answers only pages of this server: a foreign Host (DNS rebinding) or Origin (another site's script) gets 403.

    Origins that the user names (`serve`) are this server's too, as seen through a proxy.
    """

    def set_default_headers(self):
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def prepare(self):
        hosts, origins = self.settings["hosts"], self.settings["origins"]
        origin = self.request.headers.get("Origin")
        own = origin in (None, *origins) or (origin == f"http://{self.request.host}" and bool(hosts or not origins))
        if not own or (hosts and self.request.host_name not in hosts):
            raise web.HTTPError(403)

    def write_error(self, status_code, **details):
        self.finish({"error": f"{status_code}: {self._reason}"})


class _Page(_Handler, web.StaticFileHandler):
    pass


class _Setup(_Handler):
    """What the page offers: models, examples, limits."""

    def get(self):
        limits = {"max_bytes": MAX_BYTES, "max_pixels": MAX_PIXELS}
        self.write({"models": list(self.settings["models"]), "examples": list(examples()), **limits})


class _Example(_Handler):
    def get(self, name: str, part: str):
        if name not in examples():
            raise web.HTTPError(404)
        self.set_header("Content-Type", "image/png" if part == "mask" else "image/jpeg")
        self.write(examples()[name][part])


@functools.cache
def examples() -> dict[str, dict[str, bytes]]:
    """{name: {"picture": JPEG, "mask": PNG}} of composites made of the embedded test photos."""
    made = {}
    for photo in load_photos("test"):
        part, mask = next(iter(photo.masks.items()))
        composite, _ = make_composite("HAdobe5k", photo.image, mask, (0, "app", photo.name))
        files = {"picture": io.BytesIO(), "mask": io.BytesIO()}
        write_picture(Image.fromarray(composite), files["picture"], "JPEG")
        Image.fromarray(mask.astype(np.uint8) * 255).save(files["mask"], "PNG")
        made[f"{photo.name} {part}"] = {key: file.getvalue() for key, file in files.items()}
    return made


class _Cancelled(BaseException):
    """The page went away."""


class _Harmonize(_Handler):
    """POST picture, model, seed, strength, feather, kind, and mask, mask_from, fit_mask or cutout, at, scale, angle ->
    lines of JSON, then the file.

    Lines: {"stage"}, and {"stage", "step", "steps"} of a diffusion model, as work goes on; then {"error"} or {"name",
    "type", "bytes"}.
    """

    def initialize(self):
        self.gone = threading.Event()

    def on_connection_close(self):
        self.gone.set()

    async def post(self):
        waiting = self.settings["waiting"]
        if len(waiting) >= MAX_WAITING:
            raise web.HTTPError(503, reason="too many pictures are waiting; try again in a minute")
        loop, lines = asyncio.get_running_loop(), asyncio.Queue()

        def report(**line) -> None:
            if self.gone.is_set():
                raise _Cancelled
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> bytes:
            with contextlib.suppress(_Cancelled):
                try:
                    about, data = self._work(report)
                    report(**about, bytes=len(data))
                    return data
                except Exception as error:  # whatever a picture raises, the page gets a line and the next its turn
                    text = str(error) if isinstance(error, HarmonyError) else f"{type(error).__name__}: {error}"
                    report(error=" ".join(text.split()))
            return b""

        waiting.add(self)
        lines.put_nowait({"stage": "waiting"})
        job = loop.run_in_executor(self.settings["pool"], work)
        job.add_done_callback(lambda _: lines.put_nowait(None))
        try:
            with contextlib.suppress(iostream.StreamClosedError):
                while (line := await lines.get()) is not None:
                    self.write(json.dumps(line) + "\n")
                    await self.flush()
                await self.finish(job.result())
        finally:
            self.gone.set()
            await asyncio.wait([job])
            waiting.discard(self)

    def _work(self, report) -> tuple[dict, bytes]:
        """({"name", "type"}, bytes) of the harmonized picture."""
        report(stage="reading")
        files, second = {}, "cutout" if "cutout" in self.request.files else "mask"
        for part in ("picture", second):
            if part not in self.request.files:
                raise HarmonyError(f"no {part} was sent")
            upload = self.request.files[part][0]
            files[part] = io.BytesIO(upload.body), upload.filename
        name, kind, ask = files["picture"][1], self.get_body_argument("kind", "png"), self.get_body_argument
        try:
            options = {key: float(ask(key, "0")) for key in ("strength", "feather")} | {"seed": int(ask("seed", "0"))}
            where = {key: float(ask(key, start)) for key, start in (("scale", "1"), ("angle", "0"))}
        except ValueError:
            raise HarmonyError("seed, strength, feather, scale and angle must be numbers") from None
        if ask("model", "") not in self.settings["models"]:
            raise HarmonyError(f"model {ask('model', '')!r} is not offered here")
        if kind not in KINDS:
            raise HarmonyError(f"kind {kind!r} is unknown; use {', '.join(KINDS)}")
        picture = open_picture(*files["picture"], MAX_PIXELS)
        check_kind(picture, KINDS[kind][0], name)
        if second == "mask":
            front, work = read_levels(*files["mask"], ask("mask_from", "auto"), MAX_PIXELS), harmonize
            options["fit_mask"] = ask("fit_mask", "") == "true"
        else:
            front, work = open_picture(*files["cutout"], MAX_PIXELS), compose
            options |= where | {"at": parse_place(ask("at", "")), "harmonized": True}
        report(stage="loading the model")
        folder, device = self.settings["models"][ask("model")], self.settings["device"]
        model = load_model(folder, device)
        report(stage="harmonizing")
        with _reported(model, report):
            result = work(picture, front, model=folder, device=device, **options)
        report(stage="saving")
        data = io.BytesIO()
        write_picture(result, data, KINDS[kind][0], name)
        return {"name": f"{Path(name).stem}-harmonized.{kind}", "type": KINDS[kind][1]}, data.getvalue()


@contextlib.contextmanager
def _reported(model, report):
    """Report every denoising step of a pipeline while it runs."""
    if not hasattr(model, "unet"):
        yield
        return
    steps = itertools.count(1)
    handle = model.unet.register_forward_hook(lambda *_: report(stage="harmonizing", step=next(steps), steps=STEPS))
    try:
        yield
    finally:
        handle.remove()


def application(host: str, models, device, origins=()) -> web.Application:
    """The app's routes. models: folders to offer beside the shipped ones; origins as in `serve`.

    Raises HarmonyError where there are no models, and for an origin that is none.
    """
    origins = {origin.rstrip("/").lower() for origin in origins}
    for origin in origins:
        if not re.fullmatch(r"https?://[^/?#@\s]+", origin):
            raise HarmonyError(f"--origin {origin}: must be as a browser's address line begins: https://HOST[:PORT]")
    proxied = {urlsplit(origin).hostname for origin in origins}
    offered = {Path(name).resolve().name: str(model_folder(name)) for name in models}
    offered |= {name: name for name in MODELS if model_folder(name)}
    routes = [
        ("/setup", _Setup),
        ("/examples/([^/]+)/(picture|mask)", _Example),
        ("/harmonize", _Harmonize),
        ("/(.*)", _Page, {"path": PAGE, "default_filename": "index.html"}),
    ]
    hosts = None if host in ("0.0.0.0", "::", "") else {"127.0.0.1", "localhost", "[::1]", host, *proxied}
    access = {"hosts": hosts, "origins": origins}
    work = {"models": offered, "device": str(pick_device(device)), "pool": ThreadPoolExecutor(1), "waiting": set()}
    return web.Application(routes, **access, **work)


def serve(port: int = 7860, host: str = "127.0.0.1", models=(), device="auto", browser: bool = True, origins=()):
    """Serve the app until Ctrl-C. Port 0 takes a free one.

    origins: addresses (https://HOST[:PORT]) at which a proxy shows the page to others than this computer.
    Raises HarmonyError for a port in use.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(port, host, application(host, models, device, origins), browser))


async def _serve(port: int, host: str, routes: web.Application, browser: bool) -> None:
    try:
        sockets = bind_sockets(port, host)
    except OSError as error:
        mend = "is in use; choose another --port" if error.errno == errno.EADDRINUSE else f"cannot be had ({error})"
        raise HarmonyError(f"{host}:{port} {mend}") from None
    server = HTTPServer(routes, max_body_size=MAX_BYTES, max_buffer_size=MAX_BYTES + 2**20)
    server.add_sockets(sockets)
    shown = "127.0.0.1" if host in ("0.0.0.0", "") else host
    shown = f"[{shown}]" if ":" in shown else shown
    address = f"http://{shown}:{sockets[0].getsockname()[1]}/"
    typer.echo(f"{address} (Ctrl-C ends it)")
    if browser:
        webbrowser.open(address)
    await asyncio.Event().wait()
