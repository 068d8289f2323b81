import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data

from harmonylib.models.base import build_autoencoder, build_unet
from harmonylib.models.identity_init import copy_colours, copy_condition


@pytest.fixture
def photo():
    return torch.from_numpy(data.astronaut()[:192, 100:292].copy()).permute(2, 0, 1).float()[None] / 127.5 - 1


@pytest.mark.parametrize("channels", [(16, 32, 64), (16, 32, 64, 128)])
def test_a_new_autoencoder_starts_with_block_colours(photo, channels):
    torch.manual_seed(0)
    vae, factor = copy_colours(build_autoencoder(channels)), 2 ** (len(channels) - 1)
    with torch.inference_mode():
        posterior = vae.encode(photo).latent_dist
        output = vae.decode(posterior.mean).sample
    blocks = F.avg_pool2d(photo, factor)
    assert (posterior.mean[:, :3] - blocks).abs().mean() < 0.06
    assert posterior.std.max() < 0.1
    assert (F.avg_pool2d(output, factor) - blocks).abs().mean() < 0.15
    assert np.corrcoef(output.flatten(), photo.flatten())[0, 1] > 0.85


def test_a_new_unet_starts_with_its_condition():
    torch.manual_seed(0)
    unet, draws = copy_condition(build_unet((64, 128))), torch.Generator().manual_seed(1)
    inputs = torch.randn(2, 9, 16, 16, generator=draws)
    condition = inputs[:, 5:] = F.interpolate(inputs[:, 5:, ::8, ::8], size=16, mode="bilinear") * 1.5
    with torch.inference_mode():
        output = unet(inputs, torch.tensor([999, 300]), torch.zeros(2, 1, 32)).sample
    assert (output + condition).abs().mean() < 0.1 * condition.abs().mean()


def test_what_is_carried_can_be_trained(photo):
    vae = copy_colours(build_autoencoder((16, 32)))
    vae(photo[..., :32, :32]).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert vae.decoder.conv_in.weight.grad[0].abs().sum() > 0
