"""What full size costs: the counter against sums worked out by hand, and the paper's sizes against a 24 GB card."""

import pytest
import torch
from diffusers import AutoencoderKL

from harmonylib.core import devices
from harmonylib.core.settings import read_profile
from harmonylib.models.pipeline import decode
from harmonylib.models.vae import HarmonyVAE
from harmonylib.tools import costs, storage

SHAPE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 8,
}


def test_the_counter_counts_what_lives():
    counter = costs.Counter("fp32")
    model = counter.make(lambda: torch.nn.Linear(1000, 1000, bias=False))  # 4 MB

    def call():
        first = torch.zeros(500, 1000)  # 2 MB
        second = model(first)  # 2 MB
        del first
        return second + second  # 2 MB

    assert counter(torch.no_grad()(call)) == (2 * 500 * 1000 * 1000, 8_000_000)
    assert counter.memory.now == 4_000_000
    step = counter.training(model, lambda: model(torch.zeros(500, 1000)).square().mean())
    assert step[1] >= 4 * 4_000_000 + 4_000_000 + 4_000_000  # weights, moments, EMA; gradient; what is kept for it


@pytest.mark.parametrize(("images", "candidates"), [(8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("kind", [HarmonyVAE, AutoencoderKL])
def test_a_batch_takes_little_more_memory_than_a_picture(monkeypatch, images, candidates, kind):
    def peak(images, candidates):
        counter = costs.Counter("fp32")
        vae = counter.make(lambda: kind(**SHAPE))
        z, image, mask = (costs.zeros(n, c, s) for n, c, s in
                          ((images * candidates, 4, 16), (images, 3, 128), (images, 1, 128)))  # fmt: skip
        return counter(torch.no_grad()(lambda: decode(vae, z, image, mask)))[1]

    monkeypatch.setattr(devices, "AREA", 128 * 128)
    bounded = peak(images, candidates) / peak(1, 1)
    monkeypatch.setattr(devices, "AREA", 100 * 128 * 128)
    assert bounded < 2 and peak(images, candidates) / peak(1, 1) > 1.5 * bounded, bounded


def test_the_paper_sizes_fit_a_card_of_24_gb():
    """As counted (costs.json): the trainings with parts of one image and checkpointing, all else as it is."""
    run = read_profile("paper").model_copy(update={"accumulation": 16, "checkpointing": True})
    peaks = costs.largest_calls(run)
    assert set(peaks) >= {"harmony_vae", "diffharmony", "resunet", "caches", "candidates", "evaluation", "table_4"}
    assert max(peaks.values()) < costs.FREE * 24e9, peaks


def test_disk_and_cache_follow_the_settings():
    paper = read_profile("paper")
    entries = storage.cache_entries(paper, 1000, 500)
    assert entries["DiffHarmony: latents, 512 px"] == 2 * 1500 * 8 * 64 * 64 * 2  # mirrored too, moments, fp16
    assert "DiffHarmony: composites, 512 px" not in entries and max(entries.values()) < 1e9 * paper.cache_gb
    png = paper.model_copy(update={"human_harmony": paper.human_harmony.model_copy(update={"format": "png"})})
    name = "candidates of Human Harmony"
    assert storage.disk(png, 1, 1)[name] > 2 * storage.disk(paper, 1, 1)[name] > 1e11
