from types import SimpleNamespace

import pytest
import torch

from harmonylib.core.errors import HarmonyError
from harmonylib.models.diffusion import edge_and_first_step
from harmonylib.models.edge_prompt import EdgePrompt
from harmonylib.models.pipeline import DiffHarmonyPipeline
from harmonylib.models.start import initial_prompt


@pytest.fixture
def edge_pipeline(tiny_pipeline):
    torch.manual_seed(0)
    prompt = EdgePrompt(32, width=24, layers=1, strips=16)
    torch.nn.init.normal_(prompt.found.weight)
    return DiffHarmonyPipeline(tiny_pipeline.vae, tiny_pipeline.unet, tiny_pipeline.scheduler, prompt.eval())


@pytest.fixture
def pair():
    """A picture whose foreground is a square, and the same with an edge of other colours around it."""
    image, mask = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    other = image.clone()
    other[..., 7, 8:24] = 0.5  # one row just outside the mask
    return image, other, mask


def test_tokens_start_at_zero_and_read_the_edge(pair):
    image, other, mask = pair
    prompt = EdgePrompt(8, width=24, layers=1, strips=16).eval()
    assert not prompt(image, mask).any()  # a UNet trained with the small base's prompt goes on as it was
    torch.nn.init.normal_(prompt.found.weight)
    tokens = prompt(image, mask)
    assert tokens.shape == (1, 3, 8) and torch.equal(tokens, prompt(image, mask))
    assert (tokens - prompt(other, mask)).abs().max() > 1e-3
    assert all(p.grad is not None for p in trained(prompt, image, mask) if p.requires_grad)  # else DDP would stop


def trained(prompt, image, mask):
    prompt(image, mask, torch.Generator().manual_seed(0)).square().sum().backward()
    return prompt.parameters()


def test_a_pipeline_reads_it_and_keeps_it(edge_pipeline, pair, tmp_path):
    image, other, mask = pair
    options = {"output_type": "latent", "candidates": 2}
    draw = lambda: [torch.Generator().manual_seed(n) for n in (1, 2)]  # noqa: E731
    latents = edge_pipeline(image, mask, 2, generator=draw(), **options).images
    constant = edge_pipeline(
        image, mask, 2, generator=draw(), prompt_embeds=edge_pipeline.prompt(image, mask), **options
    )
    assert torch.allclose(latents, constant.images) and latents.shape[0] == 2
    assert not torch.allclose(latents, edge_pipeline(other, mask, 2, generator=draw(), **options).images, atol=1e-4)
    edge_pipeline.save_pretrained(tmp_path / "saved")
    again = DiffHarmonyPipeline.from_pretrained(tmp_path / "saved", device="cpu", torch_dtype=torch.bfloat16)
    assert isinstance(again.prompt, EdgePrompt) and again.prompt.found.weight.dtype == torch.float32
    torch.testing.assert_close(again.prompt(image, mask), edge_pipeline.prompt(image, mask))


def test_where_a_training_starts(edge_pipeline, tiny_pipeline, tmp_path):
    edge_pipeline.save_pretrained(tmp_path / "saved")
    on, off = (SimpleNamespace(edge=edge, first_step=0.8) for edge in (True, False))
    assert initial_prompt(off, None, tiny_pipeline, "harmonize") is tiny_pipeline.prompt
    assert initial_prompt(on, None, tiny_pipeline, "inverse") is tiny_pipeline.prompt
    new = initial_prompt(on, None, tiny_pipeline, "harmonize")
    assert not new.found.weight.any() and new.head.strip[0].weight.std() > 0.05  # the head has been trained
    found = initial_prompt(on, tmp_path / "saved", tiny_pipeline, "harmonize")
    assert torch.equal(found.found.weight, edge_pipeline.prompt.found.weight)
    with pytest.raises(HarmonyError, match="diffharmony.edge is False, but not in .*saved"):
        initial_prompt(off, tmp_path / "saved", tiny_pipeline, "harmonize")


def test_what_is_the_harmonizers_alone():
    section = SimpleNamespace(edge=True, first_step=0.8)
    assert edge_and_first_step(section, "harmonize") == (True, 0.8)
    assert edge_and_first_step(section, "inverse") == (False, 0.0)
