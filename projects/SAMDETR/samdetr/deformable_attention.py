"""Multi-scale deformable attention (Deformable DETR, section 4.1) in plain torch: no compiler, right on every device.

Shapes: B images, N queries (here: pixels of all levels), C model width, M heads, V levels, P points a level,
S = sum of H_v * W_v.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["MultiScaleDeformableAttention", "multi_scale_deformable_sampling"]


def multi_scale_deformable_sampling(
    value: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample values bilinearly, with zeros outside the maps, and add the samples up.

    Args:
        value: (B, S, M, D), the levels' values, flattened and concatenated.
        level_sizes: height and width of each level, Python integers.
        locations: (B, N, M, V, P, 2), (x, y) in [0, 1] inside the (padded) map.
        weights: (B, N, M, V, P).

    Returns:
        (B, N, M * D).
    """
    batch, _, heads, head_dim = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    grid = 2 * locations - 1
    weights = weights.permute(0, 2, 3, 1, 4).flatten(0, 1).to(value.dtype)  # (B M, V, N, P)
    result = value.new_zeros(batch * heads, head_dim, num_queries)
    parts = value.split([height * width for height, width in level_sizes], dim=1)
    for level, ((height, width), part) in enumerate(zip(level_sizes, parts)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        points = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B M, N, P, 2)
        # Positions keep their float32 in mixed precision, and grid_sample wants both alike.
        samples = F.grid_sample(
            maps.to(points.dtype), points, mode="bilinear", padding_mode="zeros", align_corners=False
        ).to(value.dtype)
        result = result + (samples * weights[:, None, level].view(-1, 1, num_queries, num_points)).sum(-1)
    return result.view(batch, heads * head_dim, num_queries).transpose(1, 2)


class MultiScaleDeformableAttention(nn.Module):
    """Each query looks at a few learned points of every level."""

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int):
        """
        Args:
            dim: model width C.
            num_heads: heads M, dividing C.
            num_levels: levels V.
            num_points: points P of each head in each level.
        """
        super().__init__()
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self._initialize()

    def _initialize(self) -> None:
        """As published with Deformable DETR: points on rays, one direction a head, farther out point by point."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        rays = torch.stack([angles.cos(), angles.sin()], dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)  # onto the square around the pixel
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = rays[:, None, None] * distances[:, None]  # (M, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.num_levels, -1, -1).flatten())
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
            query: (B, N, C).
            reference_points: (B, N, V, 2), (x, y) in [0, 1] of each level's (padded) map.
            memory: (B, S, C), the levels, flattened and concatenated.
            level_sizes: height and width of each level.
            padding_mask: (B, S), True at padded pixels, whose value is zero; or None.

        Returns:
            (B, N, C).
        """
        value = self.value(memory)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        offsets = self.sampling_offsets(query).float()
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        sizes = torch.tensor([(width, height) for height, width in level_sizes], dtype=torch.float32)
        sizes = sizes.to(query.device)[:, None]  # (V, 1, 2): offsets are in pixels
        locations = reference_points.float()[:, :, None, :, None] + offsets / sizes
        weights = self.attention_weights(query).float().unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        return self.output(multi_scale_deformable_sampling(value, level_sizes, locations, weights))
