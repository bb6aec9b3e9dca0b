"""Matching between predictions and the ground truth: one to one (paper section 3.1, as in DETR), or one box to many.

Shapes: L decoder layers, B images, Q queries, K classes, T boxes of all images together; every layer has the same number of
matched pairs, one to one the sum over images of min(Q, number of boxes).
"""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..ops.blocks import blocks
from ..ops.runtime import upload
from .boxes import cxcywh_to_xyxy, generalized_iou
from .structures import ImageTarget, Predictions

__all__ = ["HungarianMatcher", "Matches"]

_PADDING_COST = 1e4  # more than any finite prediction costs with the usual weights, and finite as well


@dataclass
class Matches:
    """The assignment of queries to ground-truth boxes, in every layer.

    Attributes:
        image: (pairs,) index of the image.
        query: (L, pairs) index of the query.
        target: (L, pairs) index into the boxes of all images, concatenated.
        finite: for each image, whether its predictions and targets are finite. Where they are not, the assignment is
            arbitrary.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    finite: list[bool]


def _assign(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the assignment of boxes (rows) to candidates (columns) at the smallest total cost."""
    num_boxes, num_candidates = costs.shape
    if num_boxes < 16 or 2 * num_boxes**2 > num_candidates:
        return linear_sum_assignment(costs)
    # Among so many candidates, pixels above all, a box needs the cheapest num_boxes only: others take one less at most.
    cheapest = np.unique(np.argpartition(costs, num_boxes - 1, axis=1)[:, :num_boxes])
    rows, columns = linear_sum_assignment(costs[:, cheapest])
    return rows, cheapest[columns]


class HungarianMatcher:
    """Assign each box to one query, at the smallest total cost, in every image and layer."""

    @configurable
    def __init__(
        self, *, class_weight: float, l1_weight: float, giou_weight: float, focal_alpha: float, focal_gamma: float
    ):
        """
        Args:
            class_weight, l1_weight, giou_weight: weights of the three costs.
            focal_alpha, focal_gamma: of the focal class cost.
        """
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "class_weight": node.MATCHER.CLASS_WEIGHT,
            "l1_weight": node.MATCHER.L1_WEIGHT,
            "giou_weight": node.MATCHER.GIOU_WEIGHT,
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
        }

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: list[ImageTarget]) -> Matches:
        """Match all layers and images, with a single transfer from the device.

        Args:
            predictions: of the matching queries.
            targets: B targets.
        """
        num_layers, num_images, num_queries = predictions.logits.shape[:3]
        costs = self.costs(predictions, targets)
        finite = predictions.logits.isfinite().all(-1) & predictions.boxes.isfinite().all(-1)  # (L, B, Q)
        finite = finite.all(2).all(0)  # (B,)
        numbers = torch.cat([costs.flatten(), finite]).cpu().numpy()
        costs, finite = numbers[:-num_images].reshape(costs.shape), numbers[-num_images:].astype(bool).tolist()
        images: list[int] = []
        queries: list[list[int]] = [[] for _ in range(num_layers)]
        matched: list[list[int]] = [[] for _ in range(num_layers)]
        first_box = 0
        for image, target in enumerate(targets):
            block = costs[first_box : first_box + len(target)]
            # Costs of finite predictions are bounded, so that their sum is finite as well.
            finite[image] = finite[image] and bool(np.isfinite(block.sum()))
            if not finite[image]:
                block = np.nan_to_num(block)
            for layer in range(num_layers):
                rows, columns = _assign(block[:, layer])
                queries[layer].extend(columns.tolist())
                matched[layer].extend((rows + first_box).tolist())
            images.extend([image] * min(num_queries, len(target)))
            first_box += len(target)
        device = predictions.logits.device
        return Matches(
            image=upload(images, device, torch.long),
            query=upload(queries, device, torch.long),
            target=upload(matched, device, torch.long),
            finite=finite,
        )

    @torch.no_grad()
    def one_to_many(self, predictions: Predictions, targets: list[ImageTarget], number: int) -> Matches:
        """Match every box with the ``number`` candidates of its image at the smallest cost; boxes may share candidates.

        Args:
            predictions: of one layer, L = 1, with at least ``number`` candidates in place of queries.
            targets: B targets.
            number: of candidates per box.

        Returns:
            The pairs, box by box; ``finite`` is not looked at.
        """
        device = predictions.logits.device
        candidates = self.costs(predictions, targets)[:, 0].topk(number, largest=False).indices  # (T, number)
        images = [i for i, target in enumerate(targets) for _ in range(len(target))]
        return Matches(
            image=upload(images, device, torch.long).repeat_interleave(number),
            query=candidates.flatten()[None],
            target=torch.arange(len(images), device=device).repeat_interleave(number)[None],
            finite=[True] * len(targets),
        )

    def costs(self, predictions: Predictions, targets: list[ImageTarget]) -> Tensor:
        """Return the cost of every pair of a box and a query of the box's image: (T, L, Q) float32."""
        num_layers, _, num_queries = predictions.logits.shape[:3]
        device = predictions.logits.device
        counts = upload([len(target) for target in targets], device)
        image = torch.repeat_interleave(counts, output_size=sum(len(target) for target in targets))
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes for target in targets]).float()
        by_image_and_class = predictions.logits.permute(1, 3, 0, 2)
        costs = predictions.logits.new_empty(len(image), num_layers, num_queries, dtype=torch.float32)
        # The intermediate results of each pair are as large as about eight boxes of four numbers.
        for _, some in blocks(1, len(image), 8 * 4 * num_layers * num_queries, device):
            costs[some] = self.pair_costs(
                by_image_and_class[image[some], labels[some]].float(),
                predictions.boxes.transpose(0, 1)[image[some]].float(),
                boxes[some, None, None],
            )
        if predictions.is_padding is not None:
            costs.masked_fill_(predictions.is_padding[image][:, None], _PADDING_COST)
        return costs

    def pair_costs(self, logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return the cost of pairs, (...), from logits of the target's class, (...), and predicted and target boxes,
        (..., 4)."""
        p = logits.sigmoid()
        alpha, gamma, eps = self.focal_alpha, self.focal_gamma, 1e-8
        positive = alpha * (1 - p) ** gamma * -(p + eps).log()
        negative = (1 - alpha) * p**gamma * -(1 - p + eps).log()
        l1 = (boxes - target_boxes).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        return self.class_weight * (positive - negative) + self.l1_weight * l1 - self.giou_weight * giou
