"""From raw predictions to detections: the best (query, class) pairs, no NMS."""

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .boxes import cxcywh_to_xyxy

__all__ = ["best_pairs", "select_detections"]


def best_pairs(logits: Tensor, boxes: Tensor, max_detections: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best (query, class) pairs of each image.

    Args:
        logits: (B, Q, K) of the last decoder layer.
        boxes: (B, Q, 4), normalised (cx, cy, w, h).
        max_detections: how many pairs to keep, if there are as many.

    Returns:
        For N pairs, best first: scores (B, N) in (0, 1), classes (B, N), boxes (B, N, 4) as normalised corners
        (x0, y0, x1, y1), not clipped, and queries (B, N).
    """
    queries, classes = logits.shape[1:]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(max_detections, queries * classes), dim=1)
    chosen = pairs // classes
    corners = cxcywh_to_xyxy(boxes).gather(1, chosen[..., None].expand(-1, -1, 4))
    return scores, pairs % classes, corners, chosen


def select_detections(
    logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]], max_detections: int
) -> list[Instances]:
    """Keep each image's best pairs of a query and a class.

    Args:
        logits: (B, Q, K) of the last decoder layer.
        boxes: (B, Q, 4), normalised (cx, cy, w, h).
        image_sizes: height and width of each image, without padding.
        max_detections: how many pairs to keep, if there are as many.

    Returns:
        For each image :class:`Instances` of its size, best first: ``pred_boxes`` in pixels (not clipped), ``scores`` in
        (0, 1), ``pred_classes``, and ``query_indices``, which query each comes from.
    """
    detections = []
    for *image_detections, (height, width) in zip(*best_pairs(logits, boxes, max_detections), image_sizes):
        result = Instances((height, width))
        result.scores, result.pred_classes, corners, result.query_indices = image_detections
        result.pred_boxes = Boxes(corners * corners.new_tensor([width, height, width, height]))
        detections.append(result)
    return detections
