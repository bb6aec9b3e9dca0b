"""The training loss: focal loss, L1 and generalised IoU, for every decoder layer (paper section 3.1, as published).

Shapes: L decoder layers, B images, Q queries, K classes, T matched pairs a layer.
"""

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor

from .boxes import cxcywh_to_xyxy, generalized_iou
from .matcher import HungarianMatcher
from .structures import DenoisingTargets, ImageTarget

__all__ = ["SetCriterion"]


def average_over_processes(values: list[float], device: torch.device) -> Tensor:
    """Mean of each value over all processes, as a float32 tensor on ``device``."""
    result = torch.tensor(values, dtype=torch.float32, device=device)
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(result)
        result = result / comm.get_world_size()
    return result


class SetCriterion:
    """Compute the weighted losses of all layers at once."""

    @configurable
    def __init__(
        self,
        *,
        matcher: HungarianMatcher,
        class_weight: float,
        l1_weight: float,
        giou_weight: float,
        focal_alpha: float,
        focal_gamma: float,
    ):
        """
        Args:
            matcher: assigns boxes to queries.
            class_weight, l1_weight, giou_weight: weights of the three losses.
            focal_alpha, focal_gamma: of the focal loss.
        """
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "matcher": HungarianMatcher(cfg),
            "class_weight": node.LOSS.CLASS_WEIGHT,
            "l1_weight": node.LOSS.L1_WEIGHT,
            "giou_weight": node.LOSS.GIOU_WEIGHT,
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
        }

    @staticmethod
    def normalizers(num_boxes: int, num_denoising: int, device: torch.device) -> Tensor:
        """What the losses are divided by: (2,) numbers of boxes and of denoising queries, averaged over processes, at
        least 1."""
        return average_over_processes([num_boxes, num_denoising], device).clamp(min=1)

    def __call__(
        self,
        pred_logits: Tensor,
        pred_boxes: Tensor,
        targets: list[ImageTarget],
        denoising: DenoisingTargets | None,
        normalizers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            pred_logits: (L, B, Q, K), the denoising queries last.
            pred_boxes: (L, B, Q, 4), normalised (cx, cy, w, h).
            targets: B targets.
            denoising: targets of the denoising queries, if there are any.
            normalizers: see :meth:`normalizers`; by default those of these targets.

        Returns:
            Scalars, weighted: ``loss_class``, ``loss_l1`` and ``loss_giou`` of the last layer, the same with ``_0``,
            ``_1``, ... for the layers before it, and all of these with ``loss_dn_`` for denoising queries. Each is a sum
            over queries, divided by the number of boxes (denoising: of denoising queries) averaged over processes, at
            least 1.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite, and the matcher stops at that.
        """
        num_denoising = 0 if denoising is None else denoising.labels.shape[1]
        num_matching = pred_logits.shape[2] - num_denoising
        if normalizers is None:
            num_boxes = sum(len(target) for target in targets)
            num_valid = 0 if denoising is None else denoising.num_valid
            normalizers = self.normalizers(num_boxes, num_valid, pred_logits.device)
        losses = self.matching_losses(
            pred_logits[:, :, :num_matching], pred_boxes[:, :, :num_matching], targets, normalizers[0]
        )
        if denoising is not None:
            losses |= self.denoising_losses(
                pred_logits[:, :, num_matching:], pred_boxes[:, :, num_matching:], denoising, normalizers[1]
            )
        return losses

    def matching_losses(
        self, pred_logits: Tensor, pred_boxes: Tensor, targets: list[ImageTarget], normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Losses of the matching queries; arguments as in :meth:`__call__`, without denoising queries."""
        matches = self.matcher(pred_logits, pred_boxes, targets)
        labels = torch.cat([target.labels for target in targets])[matches.target]  # (L, T)
        boxes = torch.cat([target.boxes for target in targets])[matches.target].float()  # (L, T, 4)
        layer = torch.arange(len(pred_logits), device=pred_logits.device)[:, None]
        matched_boxes = pred_boxes[layer, matches.image, matches.query]
        class_targets = torch.zeros_like(pred_logits)
        class_targets[layer, matches.image, matches.query, labels] = 1
        class_loss = self.focal_loss(pred_logits, class_targets).sum((1, 2, 3))
        l1, giou = self.box_losses(matched_boxes, boxes)
        if has_event_storage() and giou.shape[1]:
            get_event_storage().put_scalar("samdetr/matched_giou", 1 - giou[-1].detach().mean())
        return self.weighted("loss", class_loss / normalizer, l1.sum(1) / normalizer, giou.sum(1) / normalizer)

    def denoising_losses(
        self, pred_logits: Tensor, pred_boxes: Tensor, denoising: DenoisingTargets, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Losses of D denoising queries: (L, B, D, K) and (L, B, D, 4) against their own boxes, without matching."""
        valid = denoising.valid.to(pred_logits.dtype)  # (B, D)
        class_targets = torch.nn.functional.one_hot(denoising.labels, pred_logits.shape[-1])
        class_targets = class_targets.to(pred_logits.dtype).expand_as(pred_logits)
        class_loss = (self.focal_loss(pred_logits, class_targets).sum(-1) * valid).sum((1, 2))
        l1, giou = (loss * valid for loss in self.box_losses(pred_boxes, denoising.boxes.float()))
        return self.weighted(
            "loss_dn", class_loss / normalizer, l1.sum((1, 2)) / normalizer, giou.sum((1, 2)) / normalizer
        )

    def focal_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sigmoid focal loss, elementwise, float32."""
        return sigmoid_focal_loss(logits, targets, alpha=self.focal_alpha, gamma=self.focal_gamma)

    @staticmethod
    def box_losses(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(..., 4) normalised (cx, cy, w, h) to the L1 distance, summed over coordinates, and 1 - GIoU: both (...)."""
        pred = pred.float()
        l1 = (pred - target).abs().sum(-1)
        return l1, 1 - generalized_iou(cxcywh_to_xyxy(pred), cxcywh_to_xyxy(target))

    def weighted(self, prefix: str, class_loss: Tensor, l1: Tensor, giou: Tensor) -> dict[str, Tensor]:
        """Name and weight the (L,) losses."""
        losses = {}
        for name, values, weight in (
            ("class", class_loss, self.class_weight),
            ("l1", l1, self.l1_weight),
            ("giou", giou, self.giou_weight),
        ):
            for layer, value in enumerate(values * weight):
                suffix = "" if layer == len(values) - 1 else f"_{layer}"
                losses[f"{prefix}_{name}{suffix}"] = value
        return losses
