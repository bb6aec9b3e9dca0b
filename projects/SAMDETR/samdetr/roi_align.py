"""RoIAlign of axis-aligned boxes as two batched matrix products.

RoIAlign (Mask R-CNN, section 3; ``aligned=True`` and adaptive sampling, as in detectron2) averages bilinear samples on a
regular grid in each bin. For an axis-aligned box, both the grid and the bilinear weights are products of one factor for y
and one for x, so that

    pooled[p, q] = sum over i, j of  R[p, i] * F[i, j] * S[q, j]

with a small matrix for each axis. That needs no compiled op, is deterministic on the CPU forward and backward, and lets
each image of a batch end where its padding starts. ``torchvision.ops.roi_align`` is the tests' oracle.

Since it is linear, it commutes with everything linear that follows: channels can be reduced before pooling, and bilinear
samples of the pooled grid, which are separable, too, can be taken from the features directly.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import accumulate_product_, blocks, is_tracing, zeros_to_accumulate

__all__ = ["linear_interpolation_weights", "roi_align", "roi_align_weights", "sample_separably"]


def linear_interpolation_weights(coordinates: Tensor, length: int) -> Tensor:
    """Weights that sample a line of ``length`` pixels at ``coordinates``, with zeros outside it.

    Differentiable in the coordinates, with the convention of ``torch.nn.functional.grid_sample`` where a coordinate
    falls on a pixel's centre (the derivative towards larger coordinates).

    Args:
        coordinates: (...), in pixels; 0 is the centre of the first pixel.
        length: number of pixels.

    Returns:
        (..., length), at most two entries of a row differ from zero.
    """
    distance = coordinates[..., None] - torch.arange(length, dtype=coordinates.dtype, device=coordinates.device)
    weights = torch.where(distance >= 0, 1 - distance, 1 + distance)
    return torch.where((distance >= -1) & (distance < 1), weights, 0)


def _bin_weights(start: Tensor, extent: Tensor, valid_length: Tensor, length: int, bins: int) -> Tensor:
    """One axis of RoIAlign, as weights; called without autograd, since no gradient flows into boxes.

    Args:
        start, extent: (B, R), the boxes' lower edge and size along this axis, in pixels (a pixel spans [i, i + 1]).
        valid_length: (B, 1), number of unpadded pixels of each image.
        length: number of pixels, padded.
        bins: number of output bins.

    Returns:
        (B, R, bins, length): each row averages the bin's samples.
    """
    device = start.device
    samples = torch.ceil(extent / bins).clamp(min=1)  # in each bin, chosen for each box
    # A box of the image is at most as large as the map: no look at the data needed. One sample more than that, since an
    # exported graph would take a dimension of 1 for a constant; and no negative numbers, which exporters round up.
    most = (length + bins - 1) // bins + 1
    sample = torch.arange(most, dtype=start.dtype, device=device)
    bin_index = torch.arange(bins, dtype=start.dtype, device=device)
    offset = bin_index[:, None] + (sample + 0.5) / samples[..., None, None]  # (B, R, bins, most), in bins
    position = start[..., None, None] + offset * (extent / bins)[..., None, None] - 0.5  # 0: the first pixel's centre
    end = valid_length[..., None, None]
    used = (sample < samples[..., None, None]) & (position >= -1) & (position <= end)
    position = torch.minimum(position.clamp(min=0), end - 1)
    low = position.floor().nan_to_num()  # a box that is NaN stays so in the weights, but not as an index
    high = torch.minimum(low + 1, end - 1)
    share = used / samples[..., None, None]
    upper = position - low
    weights = position.new_zeros(*start.shape, bins, length)
    weights.scatter_add_(-1, low.long(), (1 - upper) * share)
    weights.scatter_add_(-1, high.long(), upper * share)
    return weights


def roi_align_weights(
    boxes: Tensor, valid_size: Tensor, size: tuple[int, int], output_size: int
) -> tuple[Tensor, Tensor]:
    """The two factors of RoIAlign's weights. No gradient flows into the boxes.

    The unpadded part's edge is the map's edge: padding has no weight.

    Args:
        boxes: (B, R, 4), (cx, cy, w, h) normalised by the image's size; w and h at most 1. They may reach over the
            image's edge and are not clipped.
        valid_size: (B, 2), width and height of each image's unpadded part, in pixels of the map.
        size: height and width of the (padded) map.
        output_size: number of bins P along each axis.

    Returns:
        Rows (B, R, P, H) and columns (B, R, P, W), float32: bin (p, q) of a box is the sum over pixels (i, j) of
        ``rows[p, i] * columns[q, j] * feature[i, j]``.
    """
    height, width = size
    with torch.no_grad():
        valid_size = valid_size[:, None].float()
        extent = boxes.float()[..., 2:] * valid_size
        start = boxes.float()[..., :2] * valid_size - extent / 2
        columns = _bin_weights(start[..., 0], extent[..., 0], valid_size[..., 0], width, output_size)
        rows = _bin_weights(start[..., 1], extent[..., 1], valid_size[..., 1], height, output_size)
    return rows, columns


def roi_align(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool the features inside boxes onto a regular grid.

    Args:
        features: (B, H, W, C).
        rows, columns: of :func:`roi_align_weights`.

    Returns:
        (B, R, P, P, C), rows (y) first, in the features' dtype.
    """
    batch, _, width, channels = features.shape
    by_row = rows.flatten(1, 2).to(features.dtype) @ features.flatten(2)  # (B, R P, W C)
    by_row = by_row.view(batch, *rows.shape[1:3], width, channels)
    return columns.to(features.dtype)[:, :, None] @ by_row


def sample_separably(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Weighted means of features, with weights that are products of one factor for y and one for x.

    Block by block, so that the full weights, (R, H W) for each image, never exist at once, and are computed again in the
    backward pass. ``sample_separably_plain`` is the same in two lines.

    Args:
        features: (B, H, W, C).
        rows: (B, R, H) float32.
        columns: (B, R, W) float32.

    Returns:
        (B, R, C), in the features' dtype.
    """
    if is_tracing():
        return sample_separably_plain(features, rows, columns)
    return _SampleSeparably.apply(features, rows, columns)


def sample_separably_plain(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """See :func:`sample_separably`."""
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2).to(features.dtype)
    return weights @ features.flatten(1, 2)


class _SampleSeparably(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(features, rows, columns)
        output = features.new_empty(*rows.shape[:2], features.shape[-1])
        for images, some in blocks(*rows.shape[:2], rows.shape[2] * columns.shape[2], rows.device):
            output[images, some] = sample_separably_plain(features[images], rows[images, some], columns[images, some])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, rows, columns = ctx.saved_tensors
        pixels = features.flatten(1, 2)
        grad_pixels, grad_rows, grad_columns = (zeros_to_accumulate(x) for x in (pixels, rows, columns))
        for images, some in blocks(*rows.shape[:2], rows.shape[2] * columns.shape[2], rows.device):
            y, x, g = rows[images, some], columns[images, some], gradient[images, some]
            weights = (y[..., :, None] * x[..., None, :]).flatten(2).to(pixels.dtype)
            accumulate_product_(grad_pixels[images], weights.transpose(1, 2), g)
            grad_weights = (g @ pixels[images].transpose(1, 2)).to(y.dtype).unflatten(-1, (y.shape[-1], x.shape[-1]))
            grad_rows[images, some] = (grad_weights @ x[..., None])[..., 0]
            grad_columns[images, some] = (y[..., None, :] @ grad_weights)[..., 0, :]
        return grad_pixels.to(features.dtype).view_as(features), grad_rows, grad_columns
