"""Multi-scale deformable attention (Deformable DETR, section 4.1) without a compiled op of its own.

Shapes: B images, N queries (in the encoder: pixels of all levels), C model width, M heads, V levels, P points a level,
S = sum of H_v * W_v.
"""

import math

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .layers import blocks, is_tracing, run_layer

__all__ = ["MultiScaleDeformableAttention", "multi_scale_deformable_sampling"]


def multi_scale_deformable_sampling(
    value: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sample values bilinearly, with zeros outside the maps, and add the samples up.

    No sample is kept for the backward pass. On a CPU this is a product with a sparse matrix; elsewhere, and while tracing,
    ``sampling_plain``.

    Args:
        value: (B, S, M, D), the levels' values, flattened and concatenated.
        level_sizes: height and width of each level, Python integers.
        locations: (B, N, M, V, P, 2), (x, y) in [0, 1] inside the (padded) map.
        weights: (B, N, M, V, P).

    Returns:
        (B, N, M * D), in the values' dtype.
    """
    if is_tracing():
        return sampling_plain(value, level_sizes, locations, weights)
    if value.device.type == "cpu":
        # Positions keep their float32 in mixed precision, and the product wants all alike.
        exact, weights = value.to(locations.dtype), weights.to(locations.dtype)
        return _SparseSampling.apply(exact, level_sizes, locations, weights).to(value.dtype)
    return run_layer(sampling_plain, value, level_sizes, locations, weights, recompute=True)


def sampling_plain(value: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """See :func:`multi_scale_deformable_sampling`; by ``grid_sample``, level by level."""
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


def sampling_matrix(level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Deformable sampling as a sparse matrix, differentiable in locations and weights.

    Args:
        level_sizes: height and width of each level.
        locations: (B, N, M, V, P, 2), (x, y) in [0, 1] inside the map.
        weights: (B, N, M, V, P).

    Returns:
        Both (B * N * M, V * P * 4): for each query and head, the indices into (B * S * M) values, int32, and their
        weights. A corner outside the map has weight zero.
    """
    batch, queries, heads, levels, points = weights.shape
    # Flat, with one number for each head, level and point: broadcasting over a short last dimension would be slow.
    height, width = locations.new_tensor(level_sizes).T[..., None].expand(2, levels, points).flatten(1).repeat(1, heads)
    areas = [height * width for height, width in level_sizes]
    integers = {"dtype": torch.int32, "device": weights.device}
    start = torch.tensor([[sum(areas[:level])] * points for level in range(levels)], **integers).flatten().repeat(heads)
    start = start + torch.arange(batch, **integers).repeat_interleave(queries)[:, None] * sum(areas)
    head = torch.arange(heads, **integers).repeat_interleave(levels * points)
    x, y = locations.flatten(0, 1).flatten(1, 3).unbind(-1)
    (left, right), (left_share, right_share) = _interpolation(x * width - 0.5, width)
    (top, bottom), (top_share, bottom_share) = _interpolation(y * height - 0.5, height)
    with torch.no_grad():
        top, bottom = (row * width.int() + start for row in (top, bottom))
        indices = [(row + column) * heads + head for row in (top, bottom) for column in (left, right)]
    top_share, bottom_share = (share * weights.flatten(0, 1).flatten(1) for share in (top_share, bottom_share))
    shares = [by_row * by_column for by_row in (top_share, bottom_share) for by_column in (left_share, right_share)]
    shape = (batch * queries, heads, levels * points)
    indices, shares = (torch.stack([x.view(shape) for x in corners], dim=2) for corners in (indices, shares))
    return indices.flatten(0, 1).flatten(1), shares.flatten(0, 1).flatten(1)


def _interpolation(position: Tensor, length: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two pixels around each position along one axis, int32, and their shares; 0 is the first pixel's centre.

    A pixel outside [0, length) has share zero, and some index inside.
    """
    with torch.no_grad():
        low = position.floor()
        low_inside, high_inside = (low >= 0) & (low < length), (low >= -1) & (low < length - 1)
        bounded = low.nan_to_num().clamp(min=-1).minimum(length - 1)
        pixels = bounded.clamp(min=0).int(), (bounded + 1).minimum(length - 1).int()
    upper = position - low
    return pixels, ((1 - upper) * low_inside, upper * high_inside)


class _SparseSampling(torch.autograd.Function):
    """:func:`sampling_plain` as a product with :func:`sampling_matrix`, which the backward pass computes again."""

    @staticmethod
    def split(locations: Tensor):
        """Images and queries of blocks so small that the matrix' intermediate results stay in the cache."""
        batch, queries, heads, levels, points, _ = locations.shape
        # Four corners of each point, and about four arrays of that size in use at a time.
        return blocks(batch, queries, 4 * 4 * heads * levels * points, locations.device)

    @staticmethod
    def forward(ctx, value, level_sizes, locations, weights):
        ctx.save_for_backward(value, locations, weights)
        ctx.level_sizes = level_sizes
        output = value.new_empty(*locations.shape[:3], value.shape[-1])
        for block in _SparseSampling.split(locations):
            indices, shares = sampling_matrix(level_sizes, locations[block], weights[block])
            rows = value[block[0]].flatten(0, 2)
            output[block] = F.embedding_bag(indices, rows, per_sample_weights=shares, mode="sum").view_as(output[block])
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        value, locations, weights = ctx.saved_tensors
        gradient = gradient.unflatten(-1, (-1, value.shape[-1]))  # (B, N, M, D)
        grad_value = torch.zeros_like(value)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        matrix = []
        for block in _SparseSampling.split(locations):
            images, some = block
            with torch.enable_grad():
                inputs = [x[block].detach().requires_grad_() for x in (locations, weights)]
                indices, shares = sampling_matrix(ctx.level_sizes, *inputs)
                rows = value[images].flatten(0, 2)
                sampled = F.embedding_bag(indices, rows, per_sample_weights=shares, mode="sum")
            grad_locations[block], grad_weights[block] = torch.autograd.grad(
                sampled, inputs, gradient[block].reshape(sampled.shape)
            )
            matrix.append((indices, shares.detach()))
            if some.stop >= gradient.shape[1]:  # the last queries of these images
                grad_rows = _transposed_product(matrix, gradient[images].flatten(0, 2), len(rows))
                grad_value[images] = grad_rows.view_as(value[images])
                matrix = []
        return grad_value, None, grad_locations, grad_weights


def _transposed_product(matrix: list[tuple[Tensor, Tensor]], gradient: Tensor, columns: int) -> Tensor:
    """The transposed sampling matrix, given as blocks of rows, times (rows, D): (columns, D)."""
    indices, factors = (torch.cat(parts) for parts in zip(*matrix))
    starts = np.arange(0, indices.numel() + 1, indices.shape[1], dtype=np.int32)
    shape = (len(indices), columns)
    by_column = csr_array((factors.flatten().numpy(), indices.flatten().numpy(), starts), shape=shape).tocsc()
    indices, starts, factors = (torch.from_numpy(x) for x in (by_column.indices, by_column.indptr, by_column.data))
    return F.embedding_bag(indices, gradient, starts[:-1], per_sample_weights=factors, mode="sum")


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
            reference_points: (B, N, M or 1, V, 2), (x, y) in [0, 1] of each level's (padded) map.
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
        locations = reference_points.float()[..., None, :] + offsets / sizes
        weights = self.attention_weights(query).float().unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))
        return self.output(multi_scale_deformable_sampling(value, level_sizes, locations, weights))
