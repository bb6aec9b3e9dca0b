"""Work on several feature levels at once: masks, flattening, and positions in each level's map.

Shapes: B images, V levels, N pixels of all levels together, C model width.
"""

import torch
from torch import Tensor

from ..ops.runtime import upload
from .structures import FeatureLevel

__all__ = ["flatten_levels", "pixel_points", "points_in_padded_maps", "replace_features"]


def flatten_levels(levels: list[FeatureLevel]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Concatenate the pixels of all levels.

    Returns:
        Features (B, N, C); position encodings (B, N, C), or (1, N, C) if nothing is padded; and the padding mask (B, N),
        None if nothing is padded.
    """
    batch = levels[0].features.shape[0]
    memory = _concatenate([level.features for level in levels], batch)
    if all(level.padding_mask is None for level in levels):
        return memory, _concatenate([level.position for level in levels], 1), None
    masks = [
        memory.new_zeros(batch, *level.size, dtype=torch.bool) if level.padding_mask is None else level.padding_mask
        for level in levels
    ]
    return memory, _concatenate([level.position for level in levels], batch), _concatenate(masks, batch)


def _concatenate(maps: list[Tensor], batch: int) -> Tensor:
    """Concatenate (batch or 1, H_v, W_v, ...) maps to (batch, N, ...)."""
    return torch.cat([x.flatten(1, 2).expand(batch, *[-1] * (x.dim() - 2)) for x in maps], dim=1)


def replace_features(levels: list[FeatureLevel], memory: Tensor) -> list[FeatureLevel]:
    """Split (B, N, C) back into levels that keep everything but their features."""
    parts = memory.split([level.size[0] * level.size[1] for level in levels], dim=1)
    return [
        FeatureLevel(part.unflatten(1, level.size), level.position, level.valid_size, level.padding_mask)
        for part, level in zip(parts, levels)
    ]


def points_in_padded_maps(points: Tensor, levels: list[FeatureLevel]) -> Tensor:
    """Express points in units of each level's map, padding included.

    Args:
        points: (B, ..., 2), (x, y) in [0, 1] inside the valid image.
        levels: V levels.

    Returns:
        (B, ..., V, 2), (x, y) in [0, 1] inside the map.
    """
    ratios = []
    for level in levels:
        size = upload(level.size, points.device, torch.float32)
        ratios.append((level.valid_size / size).flip(-1))
    stacked = torch.stack(ratios, dim=1)  # (B, V, 2)
    return points[..., None, :] * stacked.view(-1, *[1] * (points.dim() - 2), len(levels), 2)


def pixel_points(levels: list[FeatureLevel]) -> Tensor:
    """Return where each pixel of each level lies: (B, N, 2), (x, y) of its centre, in [0, 1] inside the valid image."""
    points = []
    for level in levels:
        height, width = level.size
        valid_size = level.valid_size.flip(-1)[:, None, None]  # (B, 1, 1, 2): width and height, as (x, y)
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float32, device=valid_size.device) + 0.5,
            torch.arange(width, dtype=torch.float32, device=valid_size.device) + 0.5,
            indexing="ij",
        )
        points.append((torch.stack([x, y], dim=-1) / valid_size).flatten(1, 2))
    return torch.cat(points, dim=1)
