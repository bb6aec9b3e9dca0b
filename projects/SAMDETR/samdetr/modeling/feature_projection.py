"""Turn the backbone's feature maps into the transformer's levels: projection, norm, position encoding, padding mask.

From here on padding is invisible: a padded map gives at its unpadded pixels what the same map gives without padding.
"""

import torch
from torch import Tensor, nn

from ..ops.runtime import upload
from .position_encoding import pixel_position_encoding
from .structures import FeatureLevel

__all__ = ["FeatureProjection", "MaskedGroupNorm", "make_padding_mask"]


def make_padding_mask(size: tuple[int, int], valid_size: Tensor) -> Tensor:
    """Return a mask (B, H, W), True beyond each image's valid height and width.

    Args:
        size: height and width of the map, padding included.
        valid_size: (B, 2), height and width of the unpadded part.
    """
    rows = torch.arange(size[0], device=valid_size.device)
    columns = torch.arange(size[1], device=valid_size.device)
    outside_y = rows >= valid_size[:, :1]
    outside_x = columns >= valid_size[:, 1:]
    return outside_y[:, :, None] | outside_x[:, None]


class MaskedGroupNorm(nn.GroupNorm):
    """GroupNorm of channels-last maps, with statistics over unpadded pixels only."""

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalise each image.

        Args:
            x: (B, H, W, C).
            padding_mask: (B, H, W), True at pixels to leave out; None if there are none.

        Returns:
            (B, H, W, C); finite but meaningless at padded pixels.
        """
        if padding_mask is None:
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        groups = x.float().unflatten(-1, (self.num_groups, -1))  # (B, H, W, groups, channels per group)
        valid = (~padding_mask)[..., None, None].to(groups.dtype)
        count = valid.sum((1, 2), keepdim=True) * groups.shape[-1]
        mean = (groups * valid).sum((1, 2, 4), keepdim=True) / count
        centred = groups - mean
        variance = (centred.square() * valid).sum((1, 2, 4), keepdim=True) / count
        normalised = (centred * (variance + self.eps).rsqrt()).flatten(3).to(x.dtype)
        return normalised * self.weight + self.bias


class FeatureProjection(nn.Module):
    """Project every level to the model's width, and attach its position encoding and its padding mask.

    Args:
        in_channels: number of channels of each level.
        strides: stride of each level, in image pixels.
        dim: model width C.
        num_groups: number of groups of the GroupNorm after each projection; 0 for no norm (as in the published
            single-scale 50-epoch models).
        temperature: of the sine position encoding.
    """

    def __init__(self, *, in_channels: list[int], strides: list[int], dim: int, num_groups: int, temperature: float):
        super().__init__()
        self.strides = list(strides)
        self.dim = dim
        self.temperature = temperature
        # A 1x1 convolution is a linear layer on channels-last maps; torch initialises both alike.
        self.projections = nn.ModuleList(nn.Linear(channels, dim) for channels in in_channels)
        self.norms = nn.ModuleList(MaskedGroupNorm(num_groups, dim) for _ in in_channels) if num_groups else None
        # Tells the levels apart, so a single level needs none.
        self.level_embedding = nn.Parameter(torch.randn(len(in_channels), dim)) if len(in_channels) > 1 else None

    def forward(self, features: list[Tensor], image_sizes: list[tuple[int, int]] | None) -> list[FeatureLevel]:
        """Make the levels.

        Args:
            features: the backbone's maps, (B, C_v, H_v, W_v).
            image_sizes: height and width of each image, without padding; None if nothing is padded.

        Returns:
            The levels, in the order of ``features``.
        """
        levels = []
        for i, feature in enumerate(features):
            size = tuple(feature.shape[-2:])
            # ResNet's convolutions and pooling round sizes up. Python integers do not synchronise with the GPU.
            valid = [
                tuple(min(-(-side // self.strides[i]), full) for side, full in zip(image_size, size))
                for image_size in image_sizes or ()
            ]
            padded = any(valid_size != size for valid_size in valid)
            valid_size = upload(valid if padded else [size], feature.device, torch.float32)
            position = pixel_position_encoding(size, valid_size, self.dim, self.temperature).to(feature.dtype)
            if self.level_embedding is not None:
                position = position + self.level_embedding[i]
            mask = make_padding_mask(size, valid_size) if padded else None
            x = self.projections[i](feature.permute(0, 2, 3, 1))
            if self.norms is not None:
                x = self.norms[i](x, mask)
            levels.append(FeatureLevel(x, position, valid_size.expand(x.shape[0], 2), mask))
        return levels
