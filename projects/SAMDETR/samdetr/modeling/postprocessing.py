"""Turn raw predictions into detections: the best (query, class) pairs, without NMS."""

from detectron2.structures import Boxes, Instances
from torch import Tensor

from ..ops.runtime import upload
from .boxes import cxcywh_to_xyxy

__all__ = ["best_pairs", "select_detections"]


def best_pairs(logits: Tensor, boxes: Tensor, max_detections: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the best (query, class) pairs of each image.

    Args:
        logits: (B, Q, K) of the last decoder layer.
        boxes: (B, Q, 4), normalised (cx, cy, w, h).
        max_detections: how many pairs to keep, if there are that many.

    Returns:
        For n pairs, best first: scores (B, n) in (0, 1); classes (B, n); boxes (B, n, 4) as normalised corners
        (x0, y0, x1, y1), not clipped; and queries (B, n).
    """
    queries, classes = logits.shape[1:]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(max_detections, queries * classes), dim=1)
    chosen = pairs // classes
    corners = cxcywh_to_xyxy(boxes).gather(1, chosen[..., None].expand(-1, -1, 4))
    return scores, pairs % classes, corners, chosen


def select_detections(
    logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """Keep the best (query, class) pairs of each image as detections.

    Args:
        logits, boxes, max_detections: see :func:`best_pairs`.
        image_sizes: height and width of each image, without padding.

    Returns:
        For each image :class:`Instances` of its size, best first: ``pred_boxes`` in pixels (not clipped), ``scores`` in
        (0, 1), ``pred_classes``, and ``query_indices``, the query that each detection comes from.
    """
    detections = []
    for *image_detections, (height, width) in zip(*best_pairs(logits, boxes, max_detections), image_sizes):
        result = Instances((height, width))
        result.scores, result.pred_classes, corners, result.query_indices = image_detections
        result.pred_boxes = Boxes(corners * upload([width, height, width, height], corners.device))
        detections.append(result)
    return detections
