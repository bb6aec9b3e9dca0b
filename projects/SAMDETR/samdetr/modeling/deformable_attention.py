"""Multi-scale deformable attention (Deformable DETR, section 4.1).

Shapes: B images, Q queries (in the encoder: all pixels), C model width, M heads, V levels, P points per level, N pixels of
all levels together.
"""

import math

import torch
from torch import Tensor, nn

from ..ops.deformable_sampling import deformable_sampling
from ..ops.runtime import upload

__all__ = ["MultiScaleDeformableAttention", "initial_offsets"]


def initial_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """Return the published start of the sampling offsets, (M * V * P * 2,): each head looks along a ray of its own.

    Its p-th point is p pixels out, at every level.
    """
    angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
    rays = rays / rays.abs().amax(dim=-1, keepdim=True)  # onto the square around the pixel
    distances = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = rays[:, None, None] * distances[:, None]  # (M, 1, P, 2)
    return offsets.expand(-1, num_levels, -1, -1).flatten()


class MultiScaleDeformableAttention(nn.Module):
    """Let each query look at a few learned points of every level."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int):
        """
        Args:
            dim: model width C.
            num_heads: heads M, dividing C.
            num_levels: levels V.
            num_points: points P of each head in each level.
        """
        super().__init__()
        self.kernels = "torch"  # set by the meta-architecture
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        """Initialise as published: one ray per head, with the p-th point p pixels out, and uniform attention."""
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(initial_offsets(self.num_heads, self.num_levels, self.num_points))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value, self.output):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        level_sizes: list[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C).
            reference_points: (B, Q, M or 1, V, 2), (x, y) in [0, 1] of each level's map, padding included.
            memory: (B, N, C), the levels, flattened and concatenated.
            level_sizes: height and width of each level.
            padding_mask: (B, N), True at padded pixels, whose value is zero; or None.

        Returns:
            (B, Q, C).
        """
        value = self.value(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).float()
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        sizes = upload([(width, height) for height, width in level_sizes], query.device, torch.float32)
        sizes = sizes[:, None]  # (V, 1, 2), as (x, y): offsets are in pixels
        locations = reference_points.float()[..., None, :] + offsets / sizes
        weights = self.attention_weights(query).float().unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        return self.output(deformable_sampling(value, level_sizes, locations, weights, self.kernels))
