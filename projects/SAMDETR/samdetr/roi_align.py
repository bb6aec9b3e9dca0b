"""RoIAlign of axis-aligned boxes as two batched matrix products.

RoIAlign (Mask R-CNN, section 3; ``aligned=True`` and adaptive sampling, as in detectron2) averages bilinear samples on a
regular grid in each bin. For an axis-aligned box, both the grid and the bilinear weights are products of one factor for y
and one for x, so that

    pooled[p, q] = sum over i, j of  R[p, i] * F[i, j] * S[q, j]

with a small matrix for each axis. That needs no compiled op, is deterministic on the CPU forward and backward, and lets
each image of a batch end where its padding starts. ``torchvision.ops.roi_align`` is the tests' oracle.
"""

import torch
from torch import Tensor

__all__ = ["linear_interpolation_weights", "roi_align"]


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
    most = max(1, -(-length // bins))  # a box of the image is at most as large as the map: no look at the data needed
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


def roi_align(features: Tensor, boxes: Tensor, valid_size: Tensor, output_size: int) -> Tensor:
    """Pool the features inside boxes onto a regular grid.

    The unpadded part's edge is the map's edge: nothing is read from padding. No gradient flows into the boxes.

    Args:
        features: (B, H, W, C).
        boxes: (B, R, 4), (cx, cy, w, h) normalised by the image's size; w and h at most 1. They may reach over the
            image's edge and are not clipped.
        valid_size: (B, 2), width and height of each image's unpadded part, in pixels of the map.
        output_size: number of bins P along each axis.

    Returns:
        (B, R, P, P, C), rows (y) first, in the features' dtype.
    """
    batch, height, width, channels = features.shape
    with torch.no_grad():
        size = valid_size[:, None].float()
        extent = boxes.float()[..., 2:] * size
        start = boxes.float()[..., :2] * size - extent / 2
        columns = _bin_weights(start[..., 0], extent[..., 0], size[..., 0], width, output_size).to(features.dtype)
        rows = _bin_weights(start[..., 1], extent[..., 1], size[..., 1], height, output_size).to(features.dtype)
    by_row = rows.flatten(1, 2) @ features.flatten(2)  # (B, R P, W C)
    by_row = by_row.view(batch, -1, output_size, width, channels)
    return columns[:, :, None] @ by_row
