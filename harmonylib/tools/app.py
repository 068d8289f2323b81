"""The browser app: one page, served to this computer, that harmonizes a picture.

Uploads stay in memory and go with their request; nothing is logged, written or fetched. The page is `app_page/`.
"""

import asyncio
import contextlib
import errno
import functools
import io
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
from ..core.picture_metadata import check_kind, open_picture, read_region, write_picture
from ..data.embedded_photos import load_photos
from ..data.recipes import make_composite
from ..inference import MODELS, harmonize, load_model, model_folder
from ..models.pipeline import DiffHarmonyPipeline

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
        hosts, origin = self.settings["hosts"], self.request.headers.get("Origin")
        foreign = bool(hosts) and self.request.host_name not in hosts
        origins = self.settings["origins"]
        own = origin in (None, *origins) or (origin == f"http://{self.request.host}" and bool(hosts or not origins))
        if foreign or not own:
            raise web.HTTPError(403)

    def write_error(self, status_code, **details):
        self.finish({"error": f"{status_code}: {self._reason}"})


class _Page(_Handler, web.StaticFileHandler):
    pass


class _Setup(_Handler):
    """What the page offers: models, examples, limits."""

    def get(self):
        self.write(
            {
                "models": list(self.settings["models"]),
                "examples": [name for name, _ in examples()],
                "max_bytes": MAX_BYTES,
                "max_pixels": MAX_PIXELS,
            }
        )


class _Example(_Handler):
    def get(self, name: str, part: str):
        files = dict(examples()).get(name)
        if files is None:
            raise web.HTTPError(404)
        self.set_header("Content-Type", "image/png" if part == "mask" else "image/jpeg")
        self.write(files[part])


@functools.cache
def examples() -> list[tuple[str, dict[str, bytes]]]:
    """(name, {"picture": JPEG, "mask": PNG}) of composites made of the embedded test photos."""
    made = []
    for photo in load_photos("test"):
        part, mask = next(iter(photo.masks.items()))
        composite, _ = make_composite("HAdobe5k", photo.image, mask, (0, "app", photo.name))
        files = {"picture": io.BytesIO(), "mask": io.BytesIO()}
        write_picture(Image.fromarray(composite), files["picture"], "JPEG")
        Image.fromarray(mask.astype(np.uint8) * 255).save(files["mask"], "PNG")
        made.append((f"{photo.name} {part}", {key: file.getvalue() for key, file in files.items()}))
    return made


class _Cancelled(Exception):
    """The page went away."""


class _Harmonize(_Handler):
    """POST picture, mask, mask_from, model, seed, strength, feather, fit_mask, kind -> lines of JSON, then the file.

    Lines: {"stage", "step", "steps"} as work goes on, then {"error"} or {"name", "type", "bytes"}.
    """

    def initialize(self):
        self.gone = threading.Event()

    def on_connection_close(self):
        self.gone.set()

    async def post(self):
        waiting = self.settings["waiting"]
        if len(waiting) >= MAX_WAITING:
            raise web.HTTPError(503, reason="too many pictures are waiting; try again in a minute")
        loop, states = asyncio.get_running_loop(), asyncio.Queue()

        def report(stage: str, step: int = 0, steps: int = 0) -> None:
            if self.gone.is_set():
                raise _Cancelled
            loop.call_soon_threadsafe(states.put_nowait, {"stage": stage, "step": step, "steps": steps})

        waiting.add(self)
        states.put_nowait({"stage": "waiting", "step": 0, "steps": 0})
        job = loop.run_in_executor(self.settings["pool"], self._work, report)
        job.add_done_callback(lambda _: states.put_nowait(None))
        try:
            with contextlib.suppress(iostream.StreamClosedError, _Cancelled):
                while (state := await states.get()) is not None:
                    await self._line(state)
                try:
                    name, kind, data = job.result()
                except _Cancelled:
                    raise
                except Exception as error:  # whatever a picture raises, the page gets a line and the next its turn
                    text = str(error) if isinstance(error, HarmonyError) else f"{type(error).__name__}: {error}"
                    await self._line({"error": " ".join(text.split())})
                    return
                await self._line({"name": name, "type": kind, "bytes": len(data)})
                await self.finish(data)
        finally:
            self.gone.set()
            await asyncio.wait([job])
            waiting.discard(self)

    async def _line(self, state: dict) -> None:
        self.write(json.dumps(state) + "\n")
        await self.flush()

    def _work(self, report) -> tuple[str, str, bytes]:
        report("reading")
        files = {}
        for part in ("picture", "mask"):
            if part not in self.request.files:
                raise HarmonyError(f"no {part} was sent")
            upload = self.request.files[part][0]
            files[part] = io.BytesIO(upload.body), upload.filename
        name, options = self.get_body_argument("model", ""), self._options()
        if name not in self.settings["models"]:
            raise HarmonyError(f"model {name!r} is not offered here")
        kind = self.get_body_argument("kind", "png")
        if kind not in KINDS:
            raise HarmonyError(f"kind {kind!r} is unknown; use {', '.join(KINDS)}")
        picture = open_picture(*files["picture"], MAX_PIXELS)
        check_kind(picture, KINDS[kind][0], files["picture"][1])
        mask = read_region(*files["mask"], self.get_body_argument("mask_from", "auto"), MAX_PIXELS)
        report("loading the model")
        folder, device = self.settings["models"][name], self.settings["device"]
        model = load_model(str(folder), str(pick_device(device)))
        report("harmonizing")
        with _reported(model, report):
            result = harmonize(picture, mask, model=folder, device=device, **options)
        report("saving")
        data = io.BytesIO()
        write_picture(result, data, KINDS[kind][0], files["picture"][1])
        return f"{Path(files['picture'][1]).stem}-harmonized.{kind}", KINDS[kind][1], data.getvalue()

    def _options(self) -> dict:
        try:
            options = {key: float(self.get_body_argument(key, "0")) for key in ("strength", "feather")}
            seed = int(self.get_body_argument("seed", "0"))
        except ValueError:
            raise HarmonyError("seed, strength and feather must be numbers") from None
        return options | {"seed": seed, "fit_mask": self.get_body_argument("fit_mask", "") == "true"}


@contextlib.contextmanager
def _reported(model, report):
    """Report every denoising step of a pipeline while it runs."""
    if not isinstance(model, DiffHarmonyPipeline):
        yield
        return
    step = 0

    def count(*_):
        nonlocal step
        step += 1
        report("harmonizing", step, STEPS)

    handle = model.unet.register_forward_hook(count)
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
    settings = {
        "hosts": None if host in ("0.0.0.0", "::", "") else {"127.0.0.1", "localhost", "[::1]", host, *proxied},
        "origins": origins,
        "models": offered,
        "device": str(pick_device(device)),
        "pool": ThreadPoolExecutor(1),
        "waiting": set(),
    }
    routes = [
        ("/setup", _Setup),
        ("/examples/([^/]+)/(picture|mask)", _Example),
        ("/harmonize", _Harmonize),
        ("/(.*)", _Page, {"path": PAGE, "default_filename": "index.html"}),
    ]
    return web.Application(routes, **settings)


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
