"""Where a training starts: from shipped weights, a folder of earlier ones or nothing (key `start` of a section)."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from ..core.errors import HarmonyError
from ..core.json_files import read_json
from .diffusion import edge_and_first_step
from .edge_prompt import EdgePrompt
from .resunet import ContrastiveResUNet, build
from .vae import HarmonyVAE
from .weights import load_strict, shipped_folder

SHAPE = ("base_channels", "depth", "residual_convs")
FOLDERS = {"resunet": "contrastive-resunet", "harmonize": "diffharmony++", "inverse": "diffharmony++-inverse"}


def start_folder(start: str | None, model: str) -> Path | None:
    """The folder that the setting `start` names for a model: "resunet", or a task of the diffusion models.

    None for null and where this release ships none: training then starts from the base or from nothing. Of another
    folder its part of the model's name is taken, where there is one: FOLDER/harmonize, FOLDER/inverse. Raises
    HarmonyError where the folder is missing.
    """
    folder = shipped_folder(FOLDERS.get(model, model)) if start == "shipped" else Path(start or "")
    if start != "shipped" and (folder / model).is_dir():
        folder = folder / model
    if start and folder.is_dir():
        return folder
    if start in (None, "shipped"):
        return None
    raise HarmonyError(f"start: {start}: no such folder; use shipped, null or the folder of a trained model")


def initial_resunet(section, folder: Path | None, seed: int) -> ContrastiveResUNet:
    """The network that section `resunet` trains: that in `folder`, or a new one with its encoder's ImageNet weights.

    A colour head that was trained alone (`view: 0`) is grown into the network that the section describes. Raises
    HarmonyError where the folder holds no ResUNet, or one of another architecture than the section says.
    """
    torch.manual_seed(seed)
    names = ["style", "affine", "head", "encoder", "view"]
    new = {name: getattr(section, name) for name in (*SHAPE, *names)}
    if folder is None:
        return build(section.size, **new)
    model = ContrastiveResUNet.from_pretrained(folder)
    alone = model.config.head == section.head == "colour" and model.config.view == 0
    if alone and section.view:
        grown = build(section.size, **new)
        grown.colour_head.load_state_dict(model.colour_head.state_dict(), strict=False)
        model, names = grown, []
    elif section.head != "colour":
        names.remove("view")
    for name in [*names, *([] if section.encoder or alone else SHAPE)]:
        if new[name] != model.config[name]:
            raise HarmonyError(
                f"params.yaml: resunet.{name} is {new[name]}, but the network in {folder} has {model.config[name]}; "
                "set that, or start: null for a new network"
            )
    torch.manual_seed(seed)  # the loss has a network to draw, too: alike, whatever loading has drawn
    return model


def initial_harmony_vae(section, folder: Path | None, vae, seed: int) -> HarmonyVAE:
    """The Harmony-VAE that section `harmony_vae` trains: that of a pipeline's `folder`, or a new one around `vae`.

    Raises HarmonyError where it was trained around another autoencoder than `vae`.
    """
    model = None
    if folder:
        model = HarmonyVAE.from_pretrained(_part(folder, "vae"))
        ours, theirs = (v.encoder.state_dict() for v in (vae, model))
        same = ours.keys() == theirs.keys() and all(
            ours[k].shape == theirs[k].shape and torch.allclose(ours[k].cpu(), theirs[k].cpu(), atol=1e-2) for k in ours
        )
        if not same:
            raise HarmonyError(f"{folder}: its autoencoder is not that of base.path; use the base it was trained with")
    torch.manual_seed(seed)
    model = model or HarmonyVAE.from_vae(vae, mask_init=section.mask_init)
    model.set_trainable(section.train_decoder)
    return model.to(vae.device)


def initial_unet(section, folder: Path | None, base) -> UNet2DConditionModel:
    """The UNet that section `diffharmony` trains: that of a pipeline's `folder`, or the base's own.

    `mask_start: base` keeps the base's weights for the mask channel (as published); zero (ours) sets them to zero, so
    that training starts from copying the composite instead of from filling a hole, which small bases need.
    Raises HarmonyError where the folder's has other channels than the base's latents need.
    """
    if folder is None:
        if section.mask_start == "zero":
            base.unet.conv_in.weight.data[:, base.vae.config.latent_channels] = 0.0
        return base.unet
    model = load_strict(UNet2DConditionModel.from_pretrained, _part(folder, "unet"))
    if model.config.out_channels != base.unet.config.out_channels:
        raise HarmonyError(f"{folder}: its UNet does not fit the base's latents; use the base it was trained with")
    return model.to(base.device)


def initial_prompt(section, folder: Path | None, base, task: str):
    """The prompt of the UNet that section `diffharmony` trains: the base's, or with `edge` an `EdgePrompt`.

    edge (ours, of the harmonizer): that of a pipeline's `folder`, or a new one with the head of the shipped ResUNet.
    Raises HarmonyError where the folder's is of the other kind.
    """
    edge, config = edge_and_first_step(section, task)[0], folder and folder / "prompt/config.json"
    if folder and edge != (config.is_file() and read_json(config).get("_class_name") == "EdgePrompt"):
        raise HarmonyError(f"params.yaml: diffharmony.edge is {section.edge}, but not in {folder}; change that")
    if not edge:
        return base.prompt
    if folder:
        return load_strict(EdgePrompt.from_pretrained, folder, subfolder="prompt").to(base.device)
    prompt = EdgePrompt(base.unet.config.cross_attention_dim)
    resunet = ContrastiveResUNet.from_pretrained(shipped_folder(FOLDERS["resunet"]))
    prompt.head.load_state_dict(resunet.colour_head.state_dict(), strict=False)  # without what the encoder says
    return prompt.to(base.device)


def _part(folder: Path, name: str) -> Path:
    """The part of a pipeline's folder, or the folder where it is that part itself."""
    return folder / name if (folder / name).is_dir() else folder
