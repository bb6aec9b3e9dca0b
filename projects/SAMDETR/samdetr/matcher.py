"""Bipartite matching between the queries' predictions and the ground truth (paper section 3.1, as in DETR).

Shapes: L decoder layers, B images, Q queries, K classes; T matched pairs a layer, the sum over images of
min(Q, number of boxes).
"""

from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import configurable
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .boxes import cxcywh_to_xyxy, generalized_iou
from .layers import blocks
from .structures import ImageTarget

__all__ = ["HungarianMatcher", "Matches", "NonFinitePredictionError"]


class NonFinitePredictionError(FloatingPointError):
    """A prediction or a target is not finite.

    Attributes:
        image_index: which image of the batch.
    """

    def __init__(self, image_index: int):
        super().__init__(f"Predictions or targets of image {image_index} of the batch are not finite.")
        self.image_index = image_index


@dataclass
class Matches:
    """Which query predicts which box, in every layer.

    Attributes:
        image: (T,) index of the image.
        query: (L, T) index of the query.
        target: (L, T) index into the boxes of all images, concatenated.
    """

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher:
    """Assign each box to one query, at the smallest total cost, in every image and layer."""

    @configurable
    def __init__(
        self,
        *,
        class_weight: float,
        l1_weight: float,
        giou_weight: float,
        focal_alpha: float,
        focal_gamma: float,
        stop_on_non_finite: bool = True,
    ):
        """
        Args:
            class_weight, l1_weight, giou_weight: weights of the three costs.
            focal_alpha, focal_gamma: of the focal class cost.
            stop_on_non_finite: whether costs that are NaN or infinite raise an error; else any assignment is made, and the
                losses show them.
        """
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.stop_on_non_finite = stop_on_non_finite

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "class_weight": node.MATCHER.CLASS_WEIGHT,
            "l1_weight": node.MATCHER.L1_WEIGHT,
            "giou_weight": node.MATCHER.GIOU_WEIGHT,
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
            "stop_on_non_finite": cfg.SOLVER.NON_FINITE == "stop",
        }

    @torch.no_grad()
    def __call__(self, pred_logits: Tensor, pred_boxes: Tensor, targets: list[ImageTarget]) -> Matches:
        """Match all layers and images, with one transfer from the device.

        Args:
            pred_logits: (L, B, Q, K).
            pred_boxes: (L, B, Q, 4), normalised (cx, cy, w, h).
            targets: B targets.

        Raises:
            NonFinitePredictionError: a cost is NaN or infinite (with ``stop_on_non_finite``).
        """
        num_layers, num_images, num_queries = pred_logits.shape[:3]
        costs = self.costs(pred_logits, pred_boxes, targets)
        finite = (pred_logits.isfinite().all(-1) & pred_boxes.isfinite().all(-1)).all(2).all(0)  # (B,)
        numbers = torch.cat([costs.flatten(), finite]).cpu().numpy()
        costs, finite = numbers[:-num_images].reshape(costs.shape), numbers[-num_images:]
        images, queries, matched = [], [[] for _ in range(num_layers)], [[] for _ in range(num_layers)]
        first_box = 0
        for image, target in enumerate(targets):
            block = costs[first_box : first_box + len(target)]
            # Costs of finite predictions are bounded, so that their sum is finite, too.
            if not (finite[image] and np.isfinite(block.sum())):
                if self.stop_on_non_finite:
                    raise NonFinitePredictionError(image)
                block = np.nan_to_num(block)
            for layer in range(num_layers):
                rows, columns = linear_sum_assignment(block[:, layer])
                queries[layer].extend(columns.tolist())
                matched[layer].extend((rows + first_box).tolist())
            images.extend([image] * min(num_queries, len(target)))
            first_box += len(target)
        device = pred_logits.device
        return Matches(
            image=torch.tensor(images, dtype=torch.long, device=device),
            query=torch.tensor(queries, dtype=torch.long, device=device),
            target=torch.tensor(matched, dtype=torch.long, device=device),
        )

    def costs(self, pred_logits: Tensor, pred_boxes: Tensor, targets: list[ImageTarget]) -> Tensor:
        """Cost of every pair of a box and a query of the box's image, all images at once.

        Args:
            pred_logits, pred_boxes, targets: see :meth:`__call__`; the images have N boxes together.

        Returns:
            (N, L, Q) float32.
        """
        num_layers, _, num_queries = pred_logits.shape[:3]
        device = pred_logits.device
        counts = torch.tensor([len(target) for target in targets], device=device)
        image = torch.repeat_interleave(counts, output_size=sum(len(target) for target in targets))
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes for target in targets]).float()
        by_image_and_class = pred_logits.permute(1, 3, 0, 2)
        costs = pred_logits.new_empty(len(image), num_layers, num_queries, dtype=torch.float32)
        # For each pair eight boxes' worth of intermediate results, of four numbers each.
        for _, some in blocks(1, len(image), 8 * 4 * num_layers * num_queries, device):
            costs[some] = self.pair_costs(
                by_image_and_class[image[some], labels[some]].float(),
                pred_boxes.transpose(0, 1)[image[some]].float(),
                boxes[some, None, None],
            )
        return costs

    def pair_costs(self, logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Cost of pairs: (...) logits of the target's class, (..., 4) predicted and target boxes to (...)."""
        p = logits.sigmoid()
        alpha, gamma, eps = self.focal_alpha, self.focal_gamma, 1e-8
        positive = alpha * (1 - p) ** gamma * -(p + eps).log()
        negative = (1 - alpha) * p**gamma * -(1 - p + eps).log()
        l1 = (boxes - target_boxes).abs().sum(-1)
        giou = generalized_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target_boxes))
        return self.class_weight * (positive - negative) + self.l1_weight * l1 - self.giou_weight * giou
