"""RoIAlign of axis-aligned boxes as two batched matrix products.

RoIAlign (Mask R-CNN, section 3; ``aligned=True`` and adaptive sampling, as in detectron2) averages bilinear samples on a
regular grid in each bin. For an axis-aligned box, both the grid and the bilinear weights factor into a part for y and a part
for x, so that

    pooled[s, t] = sum over i, j of  rows[s, i] * columns[t, j] * feature[i, j]

with one small matrix per axis. This needs no compiled op, is deterministic on the CPU, forward and backward, and can end each
image of a batch where its padding starts. The tests compare it with ``torchvision.ops.roi_align``.

RoIAlign is linear, so it commutes with every linear step after it: channels can be reduced before pooling, and bilinear
samples of the pooled grid, which are separable as well, can be taken from the features directly.

Shapes: B images, R boxes per image, S bins along each side of a box, P points per image, H x W a feature map, C channels.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import accumulate_product_, blocks, empty_to_accumulate, place
from .runtime import is_tracing

__all__ = [
    "linear_interpolation_weights",
    "roi_align",
    "roi_align_weights",
    "sample_separably",
    "sample_separably_plain",
]


def linear_interpolation_weights(coordinates: Tensor, length: int) -> Tensor:
    """Return the weights that sample a line of ``length`` pixels at ``coordinates``, with zeros outside the line.

    Differentiable in the coordinates. At a pixel's centre, the derivative towards larger coordinates is taken, as by
    ``torch.nn.functional.grid_sample``.

    Args:
        coordinates: (...), in pixels; 0 is the centre of the first pixel.
        length: number of pixels.

    Returns:
        (..., length); at most two entries of each row differ from zero.
    """
    distance = coordinates[..., None] - torch.arange(length, dtype=coordinates.dtype, device=coordinates.device)
    weights = torch.where(distance >= 0, 1 - distance, 1 + distance)
    return torch.where((distance >= -1) & (distance < 1), weights, 0)


def roi_align_weights(boxes: Tensor, valid_size: Tensor, size: tuple[int, int], bins: int) -> tuple[Tensor, Tensor]:
    """Return the two factors of RoIAlign's weights. No gradient flows into the boxes, and padding gets no weight.

    Args:
        boxes: (B, R, 4), (cx, cy, w, h) normalised by the image's size; w and h are at most 1. Boxes may reach over the
            image's edge and are not clipped.
        valid_size: (B, 2), height and width of each image's unpadded part, in pixels of the map.
        size: height and width of the map, padding included.
        bins: number of bins S along each side.

    Returns:
        ``rows`` (B, R, S, H) and ``columns`` (B, R, S, W), float32: bin (s, t) of a box is the sum over pixels (i, j) of
        ``rows[s, i] * columns[t, j] * feature[i, j]``.
    """
    height, width = size
    with torch.no_grad():
        valid = valid_size[:, None].float().flip(-1)  # (B, 1, 2), along x and y, as all that follows
        centre, extent = boxes.float().unflatten(-1, (2, 2)).unbind(-2)
        extent = extent * valid
        start = centre * valid - extent / 2
        if is_tracing():  # an exporter cannot tell which side is longer
            x, y = (
                _bin_weights(*(value[..., axis] for value in (start, extent, valid)), length, bins)
                for axis, length in enumerate((width, height))
            )
            return y, x
        weights = _bin_weights(start, extent, valid, max(size), bins)
    return weights[:, :, 1, :, :height], weights[:, :, 0, :, :width]


def _bin_weights(start: Tensor, extent: Tensor, valid_length: Tensor, length: int, bins: int) -> Tensor:
    """Return the weights of RoIAlign along one axis, or along both at once, in fewer operations; called without autograd.

    Args:
        start, extent: (B, R) or (B, R, 2), lower edge and size of each box along an axis, in pixels (pixel i spans [i, i + 1]).
        valid_length: (B, 1) or (B, 1, 2), number of unpadded pixels of each image.
        length: number of pixels of the longer axis, padding included.
        bins: number of bins S.

    Returns:
        (B, R, S, length) or (B, R, 2, S, length): row s averages the samples of bin s; padding has no weight.
    """
    device = start.device
    samples = torch.ceil(extent / bins).clamp(min=1)  # number of samples per bin, chosen for each box
    # A box is at most as large as the map, which bounds the number of samples without reading the data. One sample is
    # added, because an exported graph would treat a dimension of 1 as a constant. The ceiling is not -(-length // bins):
    # exporters round negative quotients up.
    most = (length + bins - 1) // bins + 1
    sample = torch.arange(most, dtype=start.dtype, device=device)
    bin_index = torch.arange(bins, dtype=start.dtype, device=device)
    samples, bin_size = samples[..., None, None], (extent / bins)[..., None, None]
    offset = bin_index[:, None] + (sample + 0.5) / samples  # (..., S, most), in bins
    position = start[..., None, None] + offset * bin_size - 0.5  # 0: centre of the first pixel
    end = valid_length[..., None, None]
    used = (sample < samples) & (position >= -1) & (position <= end)
    position = torch.minimum(position.clamp(min=0), end - 1)
    low = position.floor().nan_to_num()  # a NaN box gives NaN weights, but must not give an invalid index
    high = torch.minimum(low + 1, end - 1)
    share = used / samples
    upper = position - low
    weights = position.new_zeros(*start.shape, bins, length)
    weights.scatter_add_(-1, low.long(), (1 - upper) * share)
    weights.scatter_add_(-1, high.long(), upper * share)
    return weights


def roi_align(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool the features inside boxes onto a regular grid.

    Args:
        features: (B, H, W, C).
        rows, columns: from :func:`roi_align_weights`.

    Returns:
        (B, R, S, S, C), bins along y first, in the dtype of the features.
    """
    batch, *_, channels = features.shape
    by_row = rows.flatten(1, 2).to(features.dtype) @ features.flatten(2)  # (B, R S, W C)
    # With -1 for the width, OpenVINO knows the other sizes in a graph that it has quantised; it loses them otherwise. Where
    # there are no boxes, -1 would be ambiguous.
    by_row = by_row.view(batch, *rows.shape[1:3], -1 if is_tracing() else features.shape[2], channels)
    return columns.to(features.dtype)[:, :, None] @ by_row


def sample_separably(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Average features with weights that factor into a part for y and a part for x.

    The full weights, (P, H * W) per image, never exist at once: they are computed block by block, and again in the backward
    pass.

    Args:
        features: (B, H, W, C).
        rows: (B, P, H) float32.
        columns: (B, P, W) float32.

    Returns:
        (B, P, C), in the dtype of the features.
    """
    function = sample_separably_plain if is_tracing() else _SampleSeparably.apply
    return function(features, rows, columns)


def sample_separably_plain(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute :func:`sample_separably` at once, with the full weights."""
    weights = (rows[..., :, None] * columns[..., None, :]).flatten(2).to(features.dtype)
    return weights @ features.flatten(1, 2)


class _SampleSeparably(torch.autograd.Function):
    """:func:`sample_separably`, block by block over images and points."""

    @staticmethod
    def split(rows: Tensor, columns: Tensor):
        """Yield slices of images and of points."""
        return blocks(*rows.shape[:2], rows.shape[2] * columns.shape[2], rows.device)

    @staticmethod
    def forward(ctx, features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(features, rows, columns)
        output = features.new_empty(*rows.shape[:2], features.shape[-1])
        for images, some in _SampleSeparably.split(rows, columns):
            part = sample_separably_plain(features[images], rows[images, some], columns[images, some])
            output = place(output, (images, some), part)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features, rows, columns = ctx.saved_tensors
        pixels = features.flatten(1, 2)
        grad_pixels = empty_to_accumulate(pixels)
        grad_rows, grad_columns = torch.empty_like(rows), torch.empty_like(columns)
        for images, some in _SampleSeparably.split(rows, columns):
            y, x, g = rows[images, some], columns[images, some], gradient[images, some]
            weights = (y[..., :, None] * x[..., None, :]).flatten(2).to(pixels.dtype)
            accumulate_product_(grad_pixels[images], weights.transpose(1, 2), g, first=some.start == 0)
            grad_weights = (g @ pixels[images].transpose(1, 2)).to(y.dtype).unflatten(-1, (y.shape[-1], x.shape[-1]))
            grad_rows = place(grad_rows, (images, some), (grad_weights @ x[..., None])[..., 0])
            grad_columns = place(grad_columns, (images, some), (y[..., None, :] @ grad_weights)[..., 0, :])
        return grad_pixels.to(features.dtype).view_as(features), grad_rows, grad_columns
