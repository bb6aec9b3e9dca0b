"""Convert boxes between two formats, and compute their generalised IoU.

(cx, cy, w, h) is centre and size, (x0, y0, x1, y1) is two corners; both may be normalised or in pixels.
"""

import torch
from torch import Tensor

__all__ = ["cxcywh_to_xyxy", "generalized_iou", "iou", "offsets_in_boxes", "xyxy_to_cxcywh"]

_SMALLEST_AREA = 1e-12  # keeps the ratios of degenerate boxes finite and changes those of no real box


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert (..., 4) boxes from (cx, cy, w, h) to (x0, y0, x1, y1)."""
    centre, size = boxes.chunk(2, dim=-1)  # both axes at once, in half as many operations as torchvision's box_convert
    half = size / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert (..., 4) boxes from (x0, y0, x1, y1) to (cx, cy, w, h)."""
    low, high = boxes.chunk(2, dim=-1)
    return torch.cat([(low + high) / 2, high - low], dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of boxes, in [0, 1]; for arguments and differences to other functions see :func:`generalized_iou`."""
    overlap, union = _overlap_and_union(a, b)
    return overlap / union.clamp(min=_SMALLEST_AREA)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the generalised IoU (https://arxiv.org/abs/1902.09630) of boxes, with broadcasting.

    Unlike torchvision's and fvcore's functions, this one does not read the data (so it does not synchronise with the GPU),
    broadcasts (so it serves pairs and matrices alike), and is finite for boxes without area.

    Args:
        a, b: (..., 4) boxes (x0, y0, x1, y1) with x0 <= x1 and y0 <= y1, shapes that broadcast.

    Returns:
        (...) values in [-1, 1].
    """
    overlap, union = _overlap_and_union(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    return overlap / union.clamp(min=_SMALLEST_AREA) - (hull - union) / hull.clamp(min=_SMALLEST_AREA)


def offsets_in_boxes(offsets: Tensor, boxes: Tensor) -> Tensor:
    """Turn offsets whose unit is the size of a box into offsets of its logits.

    The centres of small boxes then move by small steps, as in R-CNN (https://arxiv.org/abs/1311.2524, appendix C). Sizes need
    no change: where a size is small, its logit is about its logarithm.

    Args:
        offsets: (..., 4), of centres (x, y), in widths and heights of the boxes, and of the logits of sizes (w, h).
        boxes: (..., 4) boxes (cx, cy, w, h), normalised, to which the offsets are relative. They get no gradient.

    Returns:
        (..., 4), what to add to the logits of ``boxes``: right for small offsets; for larger ones, centres stay in the image.
    """
    centre, size = boxes.detach().chunk(2, dim=-1)
    centre = centre.clamp(1e-3, 1 - 1e-3)
    slope = centre * (1 - centre)  # of the sigmoid
    # A box inside the image is at most twice as wide as its centre is far from the edge, so that only others are limited.
    steps = (size / slope).clamp(max=4)
    return torch.cat([offsets[..., :2] * steps, offsets[..., 2:]], dim=-1)


def _overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas that boxes share and that they cover together."""
    corner = torch.maximum(a[..., :2], b[..., :2])
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - corner).clamp(min=0).prod(-1)
    return overlap, (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - overlap
