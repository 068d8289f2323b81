import pytest
import timm
import torch
from conftest import COLOUR

from harmonylib import ContrastiveResUNet, HarmonyError
from harmonylib.models.colour_map import apply_map
from harmonylib.models.contrastive import ResUNetLoss
from harmonylib.models.encoder import PACKAGED, PretrainedEncoder, create, normalised, packaged_weights
from harmonylib.models.resunet import STYLES, SpatialSeparatedAttention, pool_mask, region_statistics, soften


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 3


def square_mask(batch=2, size=8):
    mask = torch.zeros(batch, 1, size, size)
    mask[:, :, 2:5, 1:6] = 1
    return mask


def tiny(**settings):
    torch.manual_seed(0)
    model = ContrastiveResUNet(**{"base_channels": 4, "depth": 3, "residual_convs": 1, **settings})
    if model.config.head == "residual":
        torch.nn.init.normal_(model.residual_head.weight, std=0.1)  # the zero head would hide everything before it
    else:
        for parameter in model.colour_head.parameters():
            if not parameter.any():  # what starts at zero hides what comes before it
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def select(x, mask):
    return x.movedim(1, -1)[mask[:, 0] > 0.5]


@pytest.mark.parametrize(
    "settings, expected",
    [({}, 28_368_503), ({"shared_affine": True}, 28_367_543), ({"style": "none"}, 28_366_583)],
)
def test_parameter_count_is_the_papers(settings, expected):
    with torch.device("meta"):
        count = sum(p.numel() for p in ContrastiveResUNet(**settings).parameters())
    assert count == expected
    assert f"{count / 1e6:.2f}" == "28.37"


def test_statistics_are_the_regions_own_or_the_identitys():
    x, mask = features(2, 3, 8, 8), square_mask()
    mask[1], mask[1, :, 1, 1] = 0, 1
    mean, std = region_statistics(x, mask)
    values = select(x[:1], mask[:1])
    torch.testing.assert_close(mean[0].flatten(), values.mean(0))
    torch.testing.assert_close(std[0].flatten(), values.std(0, correction=0))
    assert torch.equal(mean[1:], x[1:, :, 1:2, 1:2]) and std[1].eq(1).all()  # one pixel
    mean, std = region_statistics(x, mask * 0)
    assert mean.eq(0).all() and std.eq(1).all()


def test_style_fusion_uses_encoder_background_for_foreground_and_decoder_background_for_background():
    decoder, encoder, mask = features(2, 3, 8, 8), features(2, 3, 8, 8, seed=1) * 0.5, square_mask()
    out = STYLES["style-fusion"](3)(decoder, encoder, mask)
    for i in range(2):
        one, fg = slice(i, i + 1), mask[i : i + 1]
        reference = select(encoder[one], 1 - fg)
        expected = (select(decoder[one], fg) - reference.mean(0)) / reference.std(0, correction=0)
        torch.testing.assert_close(select(out[one], fg), expected)
        background = select(out[one], 1 - fg)
        torch.testing.assert_close(background.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(background.var(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("style", ["adain", "rain"])
def test_adain_and_rain_give_the_foreground_the_decoder_backgrounds_statistics(style):
    decoder, encoder, mask = features(1, 3, 8, 8), features(1, 3, 8, 8, seed=1), square_mask(1)
    decoder = torch.where(mask > 0, decoder * 3 - 10, decoder)
    out = STYLES[style](3)(decoder, encoder, mask)
    style_mean, style_std = region_statistics(decoder, 1 - mask)
    mean, std = region_statistics(out, mask)
    torch.testing.assert_close(mean, style_mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std, style_std, atol=1e-4, rtol=1e-4)
    background = select(out, 1 - mask)
    if style == "adain":
        assert torch.equal(background, select(decoder, 1 - mask))
    else:
        torch.testing.assert_close(background.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    assert torch.equal(out, STYLES[style](3)(decoder, encoder * 2, mask))  # the encoder has no say


@pytest.mark.parametrize("shared", [False, True])
def test_affine_is_one_plus_gamma_and_beta_per_channel_and_region(shared):
    decoder, encoder, mask = features(1, 2, 8, 8), features(1, 2, 8, 8, seed=1), square_mask(1)
    module = STYLES["style-fusion"](2, shared)
    plain = module(decoder, encoder, mask)
    with torch.no_grad():
        module.gamma[0] += torch.tensor([1.0, 0.0])
        module.beta[0] += torch.tensor([0.0, 0.5])
    changed = torch.stack([plain[:, 0] * 2, plain[:, 1] + 0.5], dim=1)
    expected = changed if shared else torch.where(mask > 0, changed, plain)
    torch.testing.assert_close(module(decoder, encoder, mask), expected)


def test_affine_functions_are_maps_of_the_features_at_each_pixel():
    decoder, encoder, mask = features(1, 2, 8, 8), features(1, 2, 8, 8, seed=1), square_mask(1)
    with torch.device("meta"):
        network = ContrastiveResUNet(shared_affine=True, affine="function")
    assert sum(parameter.numel() for parameter in network.parameters()) == 28_541_623  # where the paper prints 28.37 M
    module = STYLES["style-fusion"](2, False, "function")
    plain = module(decoder, encoder, mask)
    assert torch.equal(plain, STYLES["style-fusion"](2)(decoder, encoder, mask))  # both start at 0
    with torch.no_grad():
        module.slope[0, 0, 1], module.slope[0, 3, 0] = 2.0, 0.5  # gamma of channel 0 by 1, beta of channel 1 by 0
    x, y = plain[:, 0], plain[:, 1]
    expected = torch.where(mask > 0, torch.stack([(1 + 2 * y) * x, y + 0.5 * x], dim=1), plain)
    torch.testing.assert_close(module(decoder, encoder, mask), expected)


def test_attention_away_from_the_edge_takes_each_path():
    x, mask = features(1, 16, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    attention = SpatialSeparatedAttention(16).eval()
    out = attention(x, mask)
    torch.testing.assert_close(out[..., :6], attention.background(x)[..., :6])
    inside = attention.learn(attention.foreground(x)) + attention.mix(x)
    torch.testing.assert_close(out[..., 10:], inside[..., 10:])
    assert not torch.allclose(out[..., 8], inside[..., 8])


def test_soft_edge_is_a_normalised_gaussian():
    impulse = torch.zeros(1, 1, 9, 9)
    impulse[..., 4, 4] = 1
    soft = soften(impulse)
    assert soft.sum() == pytest.approx(1)
    assert (soft[0, 0, 4, 5] / soft[0, 0, 4, 4]).item() == pytest.approx(0.7788, abs=1e-4)  # exp(-1/4)
    assert (soft[0, 0, 6, 6] / soft[0, 0, 4, 4]).item() == pytest.approx(0.1353, abs=1e-4)  # exp(-2)
    assert soft[0, 0, 4, 7] == 0
    torch.testing.assert_close(soften(torch.ones(1, 1, 5, 5)), torch.ones(1, 1, 5, 5))  # reflected borders


def test_pool_mask_averages_two_by_two_and_rounds():
    mask = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])[None, None]
    assert pool_mask(mask, 2).tolist() == [[[[1, 0], [0, 0]]]]
    assert pool_mask(mask, 4).tolist() == [[[[1]]]]  # the upper left 2x2 of each 4x4
    assert torch.equal(pool_mask(mask, 1), mask)


def masks(kind, batch, height, width):
    mask = torch.full((batch, 1, height, width), float(kind == "all"))
    if kind == "one pixel":
        mask[:, :, height // 2, width // 2] = 1
    if kind == "all but one pixel":
        mask = 1 - masks("one pixel", batch, height, width)
    return mask


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (37, 50), (5, 90)])
@pytest.mark.parametrize("kind", ["none", "all", "one pixel", "all but one pixel"])
@pytest.mark.parametrize("settings", [*({"style": s} for s in STYLES), COLOUR], ids=[*STYLES, "colour"])
def test_awkward_inputs_are_finite_forward_and_backward(settings, kind, size):
    model, mask = tiny(**settings), masks(kind, 1, *size)
    for image in (torch.rand(1, 3, *size) * 2 - 1, torch.full((1, 3, *size), 0.3)):
        output = model(image, mask)
        assert output.shape == image.shape and output.isfinite().all()
        output.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()
        with torch.no_grad():
            assert model.eval()(image, mask).isfinite().all()
        model.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite_and_close(dtype):
    model, image, mask = tiny().eval(), torch.rand(2, 3, 23, 23) * 2 - 1, square_mask(2, 23)
    image[1] = 0.3  # zero variance
    with torch.no_grad():
        reference = model(image, mask)
        with torch.autocast("cpu", dtype):
            output = model(image, mask)
        assert output.dtype == torch.float32 and output.isfinite().all()
        assert (output - reference).abs().mean() < 0.05 * (reference - image).abs().mean()
        half = model.to(dtype)(image.to(dtype), mask)
    assert half.dtype == dtype and half.isfinite().all()
    assert (half - reference).abs().mean() < 0.05 * (reference - image).abs().mean()


@pytest.mark.parametrize(
    "settings",
    [{"style": "rain", "shared_affine": True}, COLOUR, COLOUR | {"view": 0}, COLOUR | {"encoder": PACKAGED}],
    ids=["residual", "colour", "head alone", "encoder"],
)
def test_save_and_load(tmp_path, settings):
    model = tiny(**settings).eval()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = ContrastiveResUNet.from_pretrained(tmp_path)
    assert all(loaded.config[name] == value for name, value in settings.items())
    image, mask = torch.rand(1, 3, 20, 20) * 2 - 1, square_mask(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image, mask), model(image, mask), atol=1e-6, rtol=0)


def test_an_encoder_that_timm_does_not_have():
    with pytest.raises(HarmonyError, match="resnet9000"):
        ContrastiveResUNet(**COLOUR, encoder="resnet9000")


# ---- the colour head ----


def test_a_mask_without_edge_gives_the_identity():
    model, image = tiny(**COLOUR).eval(), torch.rand(3, 3, 40, 50) * 2 - 1
    mask = torch.cat([masks("all", 1, 40, 50), masks("none", 1, 40, 50), masks("one pixel", 1, 40, 50)])
    with torch.no_grad():
        output = model(image, mask)
    assert torch.equal(output[:2], image[:2]) and not torch.equal(output[2], image[2])


def test_the_output_is_one_colour_map_that_every_part_of_the_network_has_a_say_in():
    model, mask = tiny(**COLOUR), square_mask(2, 48)
    mask[..., 20:30, 20:30] = 1
    image = torch.rand(2, 3, 48, 48) * 2 - 1
    model(image, mask).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (model.down[0].first[0].weight.grad.abs().sum((0, 2, 3)) > 0).all()
    model.eval()
    with torch.no_grad():
        mapped = apply_map(model.colour_map(image, mask), image)
        torch.testing.assert_close(model(image, mask), torch.where(mask > 0, mapped, image))
        one = model.colour_map(image[1:], mask[1:])
        torch.testing.assert_close(model.colour_map(image, mask)[1:], one, atol=1e-4, rtol=1e-3)
        draws = [model.colour_map(image, mask, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_pretrained_encoder_starts_from_the_pictures_imagenet_features():
    """Whatever the mask, in training mode too: batch statistics stay ImageNet's."""
    plain = timm.create_model(PACKAGED, features_only=True).eval()
    known = packaged_weights(timm.create_model(PACKAGED, num_classes=0))
    plain.load_state_dict({name: known[name] for name in plain.state_dict()})
    encoder = PretrainedEncoder().load_imagenet_weights().train()
    image, mask = torch.rand(2, 3, 64, 64) * 2 - 1, square_mask(2, 64)
    with torch.no_grad():
        expected = plain(normalised(image, plain))[1:]
        found, other = encoder(image, mask), encoder(image, 1 - mask)
    assert [x.shape[-1] for x in found] == [16, 8, 4, 2] and [x.shape[1] for x in found] == encoder.channels
    for features, same, wanted in zip(found, other, expected, strict=True):
        assert torch.equal(features, same) and wanted.abs().sum() > 0
        torch.testing.assert_close(features, wanted, atol=1e-4, rtol=1e-4)


def test_four_images_are_overfitted_beyond_40_db():
    """The whole loss, from scratch, where the output is the composite; judged in eval mode on the worst image."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 6, 6, generator=draw) * 1.6 - 0.8
    real, mask = torch.nn.functional.interpolate(coarse, (32, 32), mode="bilinear"), torch.zeros(4, 1, 32, 32)
    mask[:, :, 8:24, 10:26] = 1
    cast = 0.2 * torch.randn(4, 3, 1, 1, generator=draw)
    composite = torch.where(mask > 0, (real * 0.7 + cast).clamp(-1, 1), real)

    def psnr(image):
        return -10 * torch.log10(((image.clamp(-1, 1) - real) / 2).square().mean((1, 2, 3))).max()

    torch.manual_seed(0)
    batch = {"composite": composite, "real": real, "mask": mask}
    steps, model, loss = 180, ContrastiveResUNet(8, 3, 1), ResUNetLoss(patches=16)
    assert torch.equal(model(composite, mask), composite)
    optimiser = torch.optim.AdamW([*model.parameters(), *loss.parameters()], weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=steps)
    for _ in range(steps):
        loss(model, batch, draw)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
    with torch.no_grad():
        assert psnr(composite) < 30 and psnr(model.eval()(composite, mask)) > 40


@pytest.mark.parametrize("size", [(64, 64), (33, 90)])
def test_own_backbone_is_timms(size):
    ours = PretrainedEncoder().eval()
    for name, tensor in ours.network.state_dict().items():
        if "running" in name or "bn" in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 2)
    theirs = create(PACKAGED, features_only=True, in_chans=4, out_indices=(-4, -3, -2, -1)).eval()
    assert list(theirs.state_dict()) == list(ours.network.state_dict())  # `packaged_weights` goes by place
    theirs.load_state_dict(ours.network.state_dict())
    image = torch.rand(2, 4, *size)
    with torch.no_grad():
        for a, b in zip(ours.network(image), theirs(image), strict=True):
            assert torch.equal(a, b)
    assert ours.channels == theirs.feature_info.channels()
    assert (ours.network.pretrained_cfg["mean"], ours.network.pretrained_cfg["std"]) == (
        theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])  # fmt: skip
