"""Sampling for multi-scale deformable attention (Deformable DETR, section 4.1), without a compiled op.

Shapes: B images, Q queries (in the encoder: all pixels), M heads, D channels per head, V levels, P points per level,
N pixels of all levels together.
"""

import functools

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .blocks import blocks
from .runtime import is_tracing, run_layer, triton_runs_on, upload

__all__ = ["deformable_sampling", "deformable_sampling_plain", "sampling_matrix"]


def deformable_sampling(
    value: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor, kernels: str = "torch"
) -> Tensor:
    """Sample values bilinearly, with zeros outside the maps, and sum the weighted samples.

    No sample is kept for the backward pass. On a CPU this is a product with a sparse matrix, which is faster there; on other
    devices it is :func:`deformable_sampling_plain`, recomputed in the backward pass.

    Args:
        value: (B, N, M, D), the values of all levels, flattened and concatenated.
        level_sizes: height and width of each level, as Python integers.
        locations: (B, Q, M, V, P, 2), (x, y) in [0, 1] inside the map, padding included.
        weights: (B, Q, M, V, P).
        kernels: "torch", or "triton" where that runs.

    Returns:
        (B, Q, M * D), in the dtype of ``value``.
    """
    if is_tracing():
        return deformable_sampling_plain(value, level_sizes, locations, weights)
    if kernels == "triton" and triton_runs_on(value.device.type):
        from .triton_sampling import deformable_sampling_triton

        return deformable_sampling_triton(value, upload(level_sizes, value.device, torch.int32), locations, weights)
    if value.device.type == "cpu":
        # In mixed precision the locations stay in float32, and the product needs one dtype.
        exact, weights = value.to(locations.dtype), weights.to(locations.dtype)
        return _DeformableSampling.apply(exact, level_sizes, locations, weights).to(value.dtype)
    return run_layer(deformable_sampling_plain, value, level_sizes, locations, weights, recompute=True, random=False)


def deformable_sampling_plain(
    value: Tensor, level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Compute :func:`deformable_sampling` with ``grid_sample``, level by level, in the precision of the locations."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    # One copy each in the order that grid_sample reads, instead of one for each level.
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (V, B M, Q, P, 2)
    weights = weights.permute(3, 0, 2, 1, 4).flatten(1, 2).to(locations.dtype)  # (V, B M, Q, P)
    values = value.to(locations.dtype).permute(0, 2, 3, 1).flatten(0, 1)  # (B M, D, N)
    maps = values.split([height * width for height, width in level_sizes], dim=2)
    by_level = []
    for size, map_, grid, weight in zip(level_sizes, maps, grids.unbind(), weights.unbind()):
        map_ = map_.unflatten(2, size)
        samples = F.grid_sample(map_, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        by_level.append((samples * weight[:, None]).sum(-1))
    result = functools.reduce(torch.add, by_level)  # (B M, D, Q)
    return result.view(batch, heads * channels, queries).transpose(1, 2).to(value.dtype)


def sampling_matrix(level_sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return deformable sampling as a sparse matrix, differentiable in locations and weights.

    Args:
        level_sizes: height and width of each level.
        locations: (B, Q, M, V, P, 2), (x, y) in [0, 1] inside the map.
        weights: (B, Q, M, V, P).

    Returns:
        Two tensors (B * Q * M, V * P * 4): for each query and head, int32 indices into the (B * N * M) values, and the
        weights of these values. A corner outside the map has weight zero.
    """
    batch, queries, heads, levels, points = weights.shape
    # Head, level and point share one long dimension, because broadcasting over a short last dimension is slow.
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
    """Return the two pixels around each position along one axis, int32, and their shares; 0 is the first pixel's centre.

    A pixel outside [0, length) gets share zero, and an arbitrary index inside.
    """
    with torch.no_grad():
        low = position.floor()
        low_inside, high_inside = (low >= 0) & (low < length), (low >= -1) & (low < length - 1)
        bounded = low.nan_to_num().clamp(min=-1).minimum(length - 1)
        pixels = bounded.clamp(min=0).int(), (bounded + 1).minimum(length - 1).int()
    upper = position - low
    return pixels, ((1 - upper) * low_inside, upper * high_inside)


class _DeformableSampling(torch.autograd.Function):
    """:func:`deformable_sampling` as a product with :func:`sampling_matrix`, which the backward pass computes again."""

    @staticmethod
    def split(locations: Tensor):
        """Yield slices of images and of queries, so small that the matrix's intermediate results stay in the cache."""
        batch, queries, heads, levels, points, _ = locations.shape
        # Each point has four corners, and about four arrays of that size are in use at a time.
        return blocks(batch, queries, 4 * 4 * heads * levels * points, locations.device)

    @staticmethod
    def forward(ctx, value, level_sizes, locations, weights):
        ctx.save_for_backward(value, locations, weights)
        ctx.level_sizes = level_sizes
        output = value.new_empty(*locations.shape[:3], value.shape[-1])
        for block in _DeformableSampling.split(locations):
            indices, shares = sampling_matrix(level_sizes, locations[block], weights[block])
            rows = value[block[0]].flatten(0, 2)
            output[block] = F.embedding_bag(indices, rows, per_sample_weights=shares, mode="sum").view_as(output[block])
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        value, locations, weights = ctx.saved_tensors
        gradient = gradient.unflatten(-1, (-1, value.shape[-1]))  # (B, Q, M, D)
        grad_value = torch.zeros_like(value)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        matrix = []
        for block in _DeformableSampling.split(locations):
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
    """Multiply the transposed sampling matrix, given as blocks of rows, by (rows, D); return (columns, D)."""
    indices, factors = (torch.cat(parts) for parts in zip(*matrix))
    starts = np.arange(0, indices.numel() + 1, indices.shape[1], dtype=np.int32)
    shape = (len(indices), columns)
    by_column = csr_array((factors.flatten().numpy(), indices.flatten().numpy(), starts), shape=shape).tocsc()
    indices, starts, factors = (torch.from_numpy(x) for x in (by_column.indices, by_column.indptr, by_column.data))
    return F.embedding_bag(indices, gradient, starts[:-1], per_sample_weights=factors, mode="sum")
