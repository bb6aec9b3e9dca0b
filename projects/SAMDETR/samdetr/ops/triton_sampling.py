"""The Triton kernels behind :func:`samdetr.ops.deformable_sampling.deformable_sampling`.

Each program treats some rows, one row being a query and a head: it reads the four pixels around each point, and adds them up
in float32 without keeping a sample. The backward pass reads them again; what it adds to the values is added atomically, so that
its last bits depend on the order.

Shapes: see ``deformable_sampling.py``; R = B * Q * M rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["deformable_sampling_triton"]

_ROWS = 16  # per program


@triton.jit
def _corner(base, column, row, width, height, start, stride, channel, channel_mask, row_mask):
    """Return the addresses of one pixel of each row, (rows, channels), and where they may be read."""
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height) & row_mask
    pixel = start + tl.where(inside, row * width + column, 0)
    return base[:, None] + pixel[:, None] * stride + channel[None, :], inside[:, None] & channel_mask[None, :]


@triton.jit
def _point(locations, weights, point, width, height, row_mask):
    """Return the pixel left of and above each row's point, the shares of the pixels right of and below it, and its weight."""
    x = tl.load(locations + 2 * point, mask=row_mask, other=0.0) * width - 0.5
    y = tl.load(locations + 2 * point + 1, mask=row_mask, other=0.0) * height - 0.5
    left, top = tl.floor(x), tl.floor(y)
    return left, top, x - left, y - top, tl.load(weights + point, mask=row_mask, other=0.0)


@triton.jit
def _forward(
    value,
    sizes,
    locations,
    weights,
    output,
    num_rows,
    num_queries,
    num_pixels,
    M: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    image = (row // (num_queries * M)).to(tl.int64)
    base = value + image * num_pixels * M * D + (row % M) * D
    total = tl.zeros((ROWS, CHANNELS), dtype=tl.float32)
    start = 0
    for v in tl.static_range(V):
        height = tl.load(sizes + 2 * v)
        width = tl.load(sizes + 2 * v + 1)
        for p in tl.static_range(P):
            point = (row.to(tl.int64) * V + v) * P + p
            left, top, right_share, bottom_share, weight = _point(locations, weights, point, width, height, row_mask)
            for corner in tl.static_range(4):
                column, line = left + corner % 2, top + corner // 2
                share = tl.where(corner % 2 == 1, right_share, 1 - right_share)
                share *= tl.where(corner // 2 == 1, bottom_share, 1 - bottom_share)
                address, mask = _corner(
                    base,
                    column.to(tl.int32),
                    line.to(tl.int32),
                    width,
                    height,
                    start,
                    M * D,
                    channel,
                    channel_mask,
                    row_mask,
                )
                total += tl.load(address, mask=mask, other=0.0).to(tl.float32) * (share * weight)[:, None]
        start += height * width
    place = output + row.to(tl.int64)[:, None] * D + channel[None, :]
    tl.store(place, total.to(output.dtype.element_ty), mask=row_mask[:, None] & channel_mask[None, :])


@triton.jit
def _backward(
    value,
    sizes,
    locations,
    weights,
    gradient,
    grad_value,
    grad_locations,
    grad_weights,
    num_rows,
    num_queries,
    num_pixels,
    M: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    channel = tl.arange(0, CHANNELS)
    channel_mask = channel < D
    image = (row // (num_queries * M)).to(tl.int64)
    offset = image * num_pixels * M * D + (row % M) * D
    place = gradient + row.to(tl.int64)[:, None] * D + channel[None, :]
    g = tl.load(place, mask=row_mask[:, None] & channel_mask[None, :], other=0.0).to(tl.float32)
    start = 0
    for v in tl.static_range(V):
        height = tl.load(sizes + 2 * v)
        width = tl.load(sizes + 2 * v + 1)
        for p in tl.static_range(P):
            point = (row.to(tl.int64) * V + v) * P + p
            left, top, right_share, bottom_share, weight = _point(locations, weights, point, width, height, row_mask)
            to_weight = tl.zeros((ROWS,), dtype=tl.float32)
            to_x = tl.zeros((ROWS,), dtype=tl.float32)
            to_y = tl.zeros((ROWS,), dtype=tl.float32)
            for corner in tl.static_range(4):
                column, line = (left + corner % 2).to(tl.int32), (top + corner // 2).to(tl.int32)
                x_share = tl.where(corner % 2 == 1, right_share, 1 - right_share)
                y_share = tl.where(corner // 2 == 1, bottom_share, 1 - bottom_share)
                address, mask = _corner(
                    value + offset, column, line, width, height, start, M * D, channel, channel_mask, row_mask
                )
                product = tl.sum(tl.load(address, mask=mask, other=0.0).to(tl.float32) * g, axis=1)
                to_weight += product * x_share * y_share
                to_x += product * y_share * (2 * (corner % 2) - 1)
                to_y += product * x_share * (2 * (corner // 2) - 1)
                address, mask = _corner(
                    grad_value + offset, column, line, width, height, start, M * D, channel, channel_mask, row_mask
                )
                tl.atomic_add(address, g * (x_share * y_share * weight)[:, None], mask=mask)
            tl.store(grad_weights + point, to_weight, mask=row_mask)
            tl.store(grad_locations + 2 * point, to_x * weight * width, mask=row_mask)
            tl.store(grad_locations + 2 * point + 1, to_y * weight * height, mask=row_mask)
        start += height * width


class _DeformableSamplingTriton(torch.autograd.Function):
    @staticmethod
    def launch(kernel, tensors, value, locations):
        batch, queries, heads, levels, points, _ = locations.shape
        rows = batch * queries * heads
        with torch.cuda.device_of(value):  # Triton launches on the current device
            kernel[(triton.cdiv(rows, _ROWS),)](
                *tensors,
                *(rows, queries, value.shape[1]),
                M=heads,
                D=value.shape[-1],
                V=levels,
                P=points,
                ROWS=_ROWS,
                CHANNELS=triton.next_power_of_2(value.shape[-1]),
            )

    @staticmethod
    def forward(ctx, value, sizes, locations, weights):
        value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
        output = value.new_empty(*locations.shape[:3], value.shape[-1])
        _DeformableSamplingTriton.launch(_forward, (value, sizes, locations, weights, output), value, locations)
        ctx.save_for_backward(value, sizes, locations, weights)
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        value, sizes, locations, weights = ctx.saved_tensors
        grad_value = torch.zeros_like(value, dtype=torch.float32)
        grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
        tensors = value, sizes, locations, weights, gradient.contiguous(), grad_value, grad_locations, grad_weights
        _DeformableSamplingTriton.launch(_backward, tensors, value, locations)
        return grad_value.to(value.dtype), None, grad_locations, grad_weights


def deformable_sampling_triton(value: Tensor, sizes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample as :func:`samdetr.ops.deformable_sampling.deformable_sampling`, in one kernel; ``sizes`` is (V, 2), int32."""
    return _DeformableSamplingTriton.apply(value, sizes, locations, weights)
