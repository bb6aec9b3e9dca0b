"""Sine embeddings of points, and of the pixel centres of feature maps (as in the published code).

The first half of the channels belongs to y, the second half to x; sines and cosines are interleaved.
"""

import functools
import math

import torch
from torch import Tensor

from ..ops.runtime import is_tracing

__all__ = ["coordinate_embedding", "pixel_position_encoding", "sine_embedding"]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # what is made in inference mode could not be used in training
def _wave_constants(dim: int, temperature: float, device: torch.device) -> Tensor:
    """Return what the angles of a sine embedding's channels are divided by: (dim / 2,)."""
    return temperature ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def coordinate_embedding(coordinate: Tensor, dim: int, temperature: float) -> Tensor:
    """Embed (...) coordinates into (..., dim), float32. The highest-frequency sine completes one period over [0, 1]."""
    if dim % 2:
        raise ValueError(f"A sine embedding needs an even number of channels per coordinate, not {dim}.")
    constants = _wave_constants.__wrapped__ if is_tracing() else _wave_constants
    angle = (2 * math.pi * coordinate.float())[..., None] / constants(dim, temperature, coordinate.device)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def sine_embedding(points: Tensor, dim: int, temperature: float) -> Tensor:
    """Embed points of the image.

    Args:
        points: (..., 2), (x, y) in [0, 1].
        dim: number of channels C, a multiple of 4.
        temperature: ratio of the longest wave length to the shortest, approximately.

    Returns:
        (..., C) float32.
    """
    return coordinate_embedding(points.flip(-1), dim // 2, temperature).flatten(-2)


def pixel_position_encoding(size: tuple[int, int], valid_size: Tensor, dim: int, temperature: float) -> Tensor:
    """Embed the centres of a feature map's pixels, (i + 0.5) / valid length.

    Args:
        size: height and width of the map, padding included.
        valid_size: (B, 2), height and width of the unpadded part, in pixels.
        dim, temperature: see :func:`sine_embedding`.

    Returns:
        (B, H, W, C) float32, finite at padded pixels as well.
    """
    height, width = size
    half = dim // 2
    rows = torch.arange(height, dtype=torch.float32, device=valid_size.device) + 0.5
    columns = torch.arange(width, dtype=torch.float32, device=valid_size.device) + 0.5
    y = coordinate_embedding(rows / valid_size[:, :1], half, temperature)  # (B, H, C / 2)
    x = coordinate_embedding(columns / valid_size[:, 1:], half, temperature)  # (B, W, C / 2)
    y = y[:, :, None].expand(-1, -1, width, -1)
    x = x[:, None].expand(-1, height, -1, -1)
    return torch.cat([y, x], dim=-1)
