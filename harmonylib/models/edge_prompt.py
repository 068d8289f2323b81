"""Tokens of the mask's edge in the place of the caption's: what the UNet's cross-attention can use (ours).

A latent is a block of 8x8 pixels, and what gives a composite away is a surface that crosses the mask's edge within a
few pixels. Stable Diffusion's cross-attention has nothing to read but an empty caption; here it reads the edge.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from .colour_head import ColourHead


class EdgePrompt(ModelMixin, ConfigMixin):
    """forward(image, mask) -> prompt embeddings BxTxdim of strips across the edge and of both regions' colours.

    dim: the UNet's cross_attention_dim; width, layers, strips and rounds: see `colour_head.ColourHead`, whose
    transformer it is. Zeros at the start: a UNet that had the small base's constant prompt goes on as it was.
    """

    @register_to_config
    def __init__(self, dim: int = 32, width: int = 96, layers: int = 2, strips: int = 128, rounds: int = 2):
        super().__init__()
        self.head = ColourHead((), width, layers, strips, rounds)
        last = self.head.rounds[-1]
        for part in (last.norm, last.prior, last.ridge, last.pair):  # for its colour map alone, which nobody asks for
            part.requires_grad_(False)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, image: torch.Tensor, mask: torch.Tensor, generator=None) -> torch.Tensor:
        """image Bx3xHxW in [-1, 1], mask Bx1xHxW in {0, 1}; generator: for training, draws the edge's pixels."""
        tokens, _ = self.head.read(image.float(), mask.float(), (), generator)
        return self.out(tokens)
