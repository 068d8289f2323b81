"""Where a training starts: the shipped weights, a folder of earlier ones, or nothing (key `start` of a section)."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from .core.errors import HarmonyError
from .models.resunet import ContrastiveResUNet, build
from .models.vae import HarmonyVAE
from .models.weights import SHIPPED, load_strict

SHAPE = ["base_channels", "depth", "residual_convs"]
RESUNET = "contrastive-resunet"
PIPELINES = {"harmonize": "diffharmony++", "inverse": "diffharmony++-inverse"}


def folder_of(start: str | None, shipped: str) -> Path | None:
    """The folder that `start` names: "shipped" is pretrained/<shipped>, null is none. HarmonyError where it is missing.

    A shipped folder that this release does not have is none, too: training then starts from the base.
    """
    if start is None:
        return None
    folder = SHIPPED / shipped if start == "shipped" else Path(start)
    if folder.is_dir() or start == "shipped":
        return folder if folder.is_dir() else None
    raise HarmonyError(f"start: {start}: no such folder; use shipped, null or the folder of a trained model")


def resunet(section, size: int) -> ContrastiveResUNet | None:
    """The ResUNet that section `resunet` starts from, or None. size: that of the training images, pixels.

    A colour head that was trained alone (`view: 0`) is grown into the network that the section describes, with a
    pre-trained encoder's ImageNet weights. Raises HarmonyError where the folder holds no ResUNet, or one of another
    architecture than the section says.
    """
    folder = folder_of(section.start, RESUNET)
    if folder is None:
        return None
    model = load_strict(ContrastiveResUNet.from_pretrained, folder)
    alone = model.config.head == section.head == "colour" and model.config.view == 0
    if alone and section.view:
        grown = build(size, **{name: getattr(section, name) for name in (*SHAPE, "style", "head", "encoder", "view")})
        grown.colour_head.load_state_dict(model.colour_head.state_dict(), strict=False)
        return grown
    names = ["style", "head", "encoder", *(["view"] if section.head == "colour" else [])]
    names += [] if section.encoder or alone else SHAPE
    for name in names:
        wanted, found = getattr(section, name), model.config[name]
        if wanted != found:
            raise HarmonyError(
                f"params.yaml: resunet.{name} is {wanted}, but the network in {folder} has {found}; "
                "set that, or start: null for a new network"
            )
    return model


def harmony_vae(section, task: str, vae) -> HarmonyVAE | None:
    """The Harmony-VAE of a pipeline's folder that section `harmony_vae` starts a task from, or None.

    Raises HarmonyError where it was trained around another autoencoder than `vae`.
    """
    folder = folder_of(section.start, PIPELINES[task])
    if folder is None:
        return None
    model = HarmonyVAE.from_pretrained(folder / "vae" if (folder / "vae").is_dir() else folder)
    ours, theirs = (v.encoder.state_dict() for v in (vae, model))
    same = ours.keys() == theirs.keys() and all(
        ours[k].shape == theirs[k].shape and torch.allclose(ours[k].cpu(), theirs[k].cpu(), atol=1e-2) for k in ours
    )
    if not same:
        raise HarmonyError(f"{folder}: its autoencoder is not that of base.path; use the base it was trained with")
    return model


def unet(section, task: str, base) -> UNet2DConditionModel:
    """The UNet that section `diffharmony` starts a task from: that of a pipeline's folder, or the base's.

    Raises HarmonyError where the folder's has other channels than the base's latents need.
    """
    folder = folder_of(section.start, PIPELINES[task])
    if folder is None:
        return base.unet
    model = load_strict(UNet2DConditionModel.from_pretrained, folder / "unet" if (folder / "unet").is_dir() else folder)
    if model.config.out_channels != base.unet.config.out_channels:
        raise HarmonyError(f"{folder}: its UNet does not fit the base's latents; use the base it was trained with")
    return model.to(base.device)
