"""From raw predictions to detections: the best (query, class) pairs, no NMS."""

from detectron2.structures import Boxes, Instances
from torch import Tensor

from .boxes import cxcywh_to_xyxy

__all__ = ["select_detections"]


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
    num_classes = logits.shape[-1]
    scores, pairs = logits.sigmoid().flatten(1).topk(min(max_detections, logits[0].numel()), dim=1)
    corners = cxcywh_to_xyxy(boxes)
    detections = []
    for i, (height, width) in enumerate(image_sizes):
        queries = pairs[i] // num_classes
        result = Instances((height, width))
        result.pred_boxes = Boxes(corners[i, queries])
        result.pred_boxes.scale(width, height)
        result.scores = scores[i]
        result.pred_classes = pairs[i] % num_classes
        result.query_indices = queries
        detections.append(result)
    return detections
