"""What the mask's edge tells, in the place of the caption: something for the UNet's cross-attention to read (ours).

A latent is a block of 8x8 pixels, and what gives a composite away is a surface that crosses the mask's edge within a
few pixels. Stable Diffusion's cross-attention has nothing to read but an empty caption; here it reads the edge, at a
larger size than the UNet's where there is one.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .colour_head import ColourHead
from .colour_map import TERMS

GENERAL = 2  # tokens of the head that speak of the whole picture


class EdgePrompt(ModelMixin, ConfigMixin):
    """forward(image, mask) -> prompt embeddings Bx3xdim: the colour head's general tokens, and the map that it finds.

    dim: the UNet's cross_attention_dim; width, layers, strips and rounds: of `colour_head.ColourHead`, which stays as
    it was trained with the ResUNet. Zeros at the start: a UNet that had the small base's prompt goes on as it was.
    """

    edge_size = 256  # long side in pixels at which it reads the edge: its head's own

    @register_to_config
    def __init__(self, dim: int = 32, width: int = 96, layers: int = 2, strips: int = 128, rounds: int = 2):
        super().__init__()
        self.head = ColourHead((), width, layers, strips, rounds).requires_grad_(False)
        self.norm = nn.LayerNorm(width)
        self.general, self.found = nn.Linear(width, dim), nn.Linear(TERMS * 3, dim)
        for layer in (self.general, self.found):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, image: torch.Tensor, mask: torch.Tensor, generator=None) -> torch.Tensor:
        """image Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}, of any size; generator: draws pixels while training."""
        with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
            tokens, colour_map = self.head.read(image.float(), mask.float(), (), generator)
        general = self.general(self.norm(tokens[:, :GENERAL]))
        return torch.cat([general, self.found(10 * colour_map.flatten(1))[:, None]], dim=1)
