import hashlib
import shutil

import pytest
import torch

import harmonylib  # noqa: F401  (first: the torchvision guard)
from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.diffusion import base_scheduler
from harmonylib.models.pipeline import DiffHarmonyPipeline, PromptEmbedding
from harmonylib.models.resunet import ContrastiveResUNet
from harmonylib.models.vae import HarmonyVAE

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(autouse=True)
def one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny_vae():
    torch.manual_seed(0)
    return build_autoencoder((8, 8, 16, 16)).eval()


@pytest.fixture
def tiny_pipeline(tiny_vae):
    torch.manual_seed(1)
    vae, unet = HarmonyVAE.from_vae(tiny_vae), build_unet((32, 32)).eval()
    pipeline = DiffHarmonyPipeline(vae, unet, base_scheduler("v_prediction"), PromptEmbedding(1, 32))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


COLOUR = {"head": "colour", "depth": 4, "view": 32, "head_width": 24, "head_layers": 1, "strips": 16}


def save_resunet(folder, map_std=0.0, **settings):
    """A random ResUNet that changes pictures and works at 32 px, saved; returns the folder. map_std: of a colour map's
    coefficients."""
    options = {"base_channels": 16, "depth": 2, "residual_convs": 0, "sample_size": 32}
    model = ContrastiveResUNet(**options | settings)
    if model.config.head == "residual":
        torch.nn.init.normal_(model.residual_head.weight, std=0.1)
    else:
        torch.nn.init.normal_(model.colour_head.rounds[0].prior.bias, std=map_std)
    model.save_pretrained(folder)
    return folder


def keys_digest(state_dict) -> str:
    """Hash of the sorted "name (shape)" lines of a state dict."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in state_dict.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.fixture(scope="session")
def browser():
    """Headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
