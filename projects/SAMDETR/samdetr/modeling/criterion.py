"""The training loss: focal loss, L1 and generalised IoU, for every decoder layer (paper section 3.1, as published).

Shapes: L decoder layers, B images, Q queries, K classes; ``pairs`` is the number of matched pairs per layer.
"""

import torch
from detectron2.config import configurable
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor
from torch.nn import functional as F

from ..ops.runtime import upload
from .boxes import cxcywh_to_xyxy, generalized_iou, iou
from .matcher import HungarianMatcher, Matches
from .structures import DenoisingTargets, ImageTarget, Predictions

__all__ = ["WRITING_PERIOD", "NonFinitePredictionError", "SetCriterion"]

WRITING_PERIOD = 20  # iterations between two lines of metrics, which the trainer keeps to


class NonFinitePredictionError(FloatingPointError):
    """A prediction or a target is not finite.

    Attributes:
        image_index: which image of the batch.
    """

    def __init__(self, image_index: int):
        super().__init__(f"Predictions or targets of image {image_index} of the batch are not finite.")
        self.image_index = image_index


def average_over_processes(values: list[float], device: torch.device) -> Tensor:
    """Return the mean of each value over all processes, as a float32 tensor on ``device``."""
    result = upload(values, device, torch.float32)
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
        iou_aware: bool = False,
        raise_on_non_finite: bool = True,
    ):
        """
        Args:
            matcher: assigns boxes to queries.
            class_weight, l1_weight, giou_weight: weights of the three losses.
            focal_alpha, focal_gamma: of the focal loss.
            iou_aware: whether the score of a matched query is to say how well its box fits (Align-DETR,
                https://arxiv.org/abs/2304.07527): its target is p^0.25 IoU^0.75, for the score p, instead of 1.
            raise_on_non_finite: whether predictions that are NaN or infinite raise an error; otherwise the losses are not
                finite either.
        """
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.iou_aware = iou_aware
        self.raise_on_non_finite = raise_on_non_finite

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
            "iou_aware": node.LOSS.IOU_AWARE,
            "raise_on_non_finite": cfg.SOLVER.NON_FINITE == "stop",
        }

    @staticmethod
    def normalizers(num_boxes: int, num_denoising: int, device: torch.device) -> Tensor:
        """Return what the losses are divided by: (2,), the numbers of boxes and of denoising queries, averaged over
        processes, at least 1."""
        return average_over_processes([num_boxes, num_denoising], device).clamp(min=1)

    def __call__(
        self,
        predictions: Predictions,
        targets: list[ImageTarget],
        denoising: DenoisingTargets | None,
        normalizers: Tensor,
    ) -> dict[str, Tensor]:
        """Compute the losses.

        Args:
            predictions: of all queries, the denoising queries last.
            targets: B targets.
            denoising: targets of the denoising queries, if there are any.
            normalizers: see :meth:`normalizers`.

        Returns:
            Scalars, weighted: ``loss_class``, ``loss_l1`` and ``loss_giou`` of the last layer, the same with ``_0``,
            ``_1``, ... for the layers before it, and all of these with ``loss_dn_`` for denoising queries. Each is a sum
            over queries, divided by the number of boxes (denoising: of denoising queries) averaged over processes, at
            least 1.

        Raises:
            NonFinitePredictionError: a prediction is NaN or infinite (with ``raise_on_non_finite``).
        """
        num_denoising = 0 if denoising is None else denoising.labels.shape[1]
        num_matching = predictions.logits.shape[2] - num_denoising
        matching = predictions.of_queries(slice(num_matching))
        losses = self.matching_losses(matching, targets, normalizers[0])
        if denoising is not None:
            of_denoising = predictions.of_queries(slice(num_matching, None))
            losses |= self.denoising_losses(of_denoising, denoising, normalizers[1])
        return losses

    def matching_losses(
        self, predictions: Predictions, targets: list[ImageTarget], normalizer: Tensor, prefix: str = "loss"
    ) -> dict[str, Tensor]:
        """Match predictions with the ground truth one to one, and return their losses.

        Args:
            predictions: of all matching queries, or of other candidates such as pixels.
            targets: B targets.
            normalizer: the number of boxes, see :meth:`normalizers`.
            prefix: of the losses' names.
        """
        matches = self.matcher(predictions, targets)
        if self.raise_on_non_finite and not all(matches.finite):
            raise NonFinitePredictionError(matches.finite.index(False))
        return self.losses_of_matches(prefix, predictions, targets, matches, normalizer)

    def losses_of_matches(
        self, prefix: str, predictions: Predictions, targets: list[ImageTarget], matches: Matches, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of given matches; what is not matched is background. For the arguments see above.

        A pixel that is matched with several boxes of one class is to have the largest of their scores. A padded pixel, which is
        matched only where an image has more boxes than pixels, learns nothing.
        """
        logits = predictions.logits
        labels = torch.cat([target.labels for target in targets])[matches.target]  # (L, pairs)
        boxes = torch.cat([target.boxes for target in targets])[matches.target].float()  # (L, pairs, 4)
        layer = torch.arange(len(logits), device=logits.device)[:, None]
        matched_boxes = predictions.boxes[layer, matches.image, matches.query]
        place = layer, matches.image, matches.query, labels
        scores = self.class_target(logits[place], matched_boxes, boxes)
        l1, giou = self.box_losses(matched_boxes, boxes)
        if predictions.is_padding is not None:
            learns = ~predictions.is_padding[matches.image, matches.query]
            scores, l1, giou = scores * learns, l1 * learns, giou * learns
        class_targets = torch.zeros_like(logits)
        if self.iou_aware:
            index = place[0]
            for size, indices in zip(logits.shape[1:], place[1:]):
                index = index * size + indices
            class_targets.view(-1).scatter_reduce_(0, index.flatten(), scores.flatten(), "amax")
        else:  # all equal
            class_targets[place] = scores
        class_loss = self.class_loss(logits, class_targets).sum((1, 2, 3))
        if has_event_storage() and giou.shape[1]:
            storage = get_event_storage()
            # Reading it waits for a GPU, and so only when the metrics are written.
            if giou.device.type == "cpu" or (storage.iter + 1) % WRITING_PERIOD == 0:
                name = prefix.replace("loss", "samdetr/matched_giou")
                storage.put_scalar(name, 1 - giou[-1].detach().mean())
        return self.weighted(prefix, class_loss / normalizer, l1.sum(1) / normalizer, giou.sum(1) / normalizer)

    def denoising_losses(
        self, predictions: Predictions, denoising: DenoisingTargets, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses of the denoising queries, each against its own box, without matching."""
        logits = predictions.logits
        valid = denoising.valid.to(logits.dtype)  # (B, Q_dn)
        own = denoising.labels.expand(logits.shape[:3])[..., None]
        target = self.class_target(logits.gather(-1, own)[..., 0], predictions.boxes, denoising.boxes.float())
        class_targets = torch.zeros_like(logits).scatter(-1, own, target[..., None])
        is_object = valid
        if denoising.negative is not None:
            class_targets = class_targets.masked_fill(denoising.negative[:, None], 0)
            is_object = valid.masked_fill(denoising.negative, 0)
        class_loss = (self.class_loss(logits, class_targets).sum(-1) * valid).sum((1, 2))
        l1, giou = (loss * is_object for loss in self.box_losses(predictions.boxes, denoising.boxes.float()))
        return self.weighted(
            "loss_dn", class_loss / normalizer, l1.sum((1, 2)) / normalizer, giou.sum((1, 2)) / normalizer
        )

    @torch.no_grad()
    def class_target(self, logits: Tensor, boxes: Tensor, target_boxes: Tensor) -> Tensor:
        """Return what the scores of objects, (...), are to be, from their logits, (...), and boxes, (..., 4)."""
        if not self.iou_aware:
            return torch.ones_like(logits)
        fit = iou(cxcywh_to_xyxy(boxes.float()), cxcywh_to_xyxy(target_boxes))
        return (logits.sigmoid() ** 0.25 * fit**0.75).clamp(min=0.01)  # more than the 0 of background

    def class_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the focal loss or, if the scores are aware of the IoU, Align-DETR's loss: elementwise, float32."""
        if not self.iou_aware:
            return sigmoid_focal_loss(logits, targets, alpha=self.focal_alpha, gamma=self.focal_gamma)
        weight = torch.where(targets > 0, 1, logits.sigmoid() ** self.focal_gamma)
        return weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")

    @staticmethod
    def box_losses(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the L1 distance, summed over coordinates, and 1 - GIoU, (...) each, of normalised boxes (..., 4)."""
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
