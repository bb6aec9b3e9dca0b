"""Predictions at every pixel of the encoded image: to select the queries' reference boxes, and to teach backbone and encoder.

Neither is the paper's. Selection is the first stage of two-stage Deformable DETR (https://arxiv.org/abs/2010.04159, appendix
A.4): the pixels' predictions are matched with the ground truth one to one, and learn from the same losses as one more decoder
layer. The dense head exists in training only; there, each box teaches several pixels (as in Co-DETR,
https://arxiv.org/abs/2211.12860, with a simpler head).

Shapes: B images, Q queries, C model width, K classes, N pixels of all levels together.
"""

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..ops.runtime import upload
from .boxes import offsets_in_boxes
from .criterion import SetCriterion
from .layers import MLP, start_heads_
from .levels import flatten_levels, pixel_points
from .structures import FeatureLevel, ImageTarget, Predictions

__all__ = ["DenseHead", "EncoderSelection", "PixelHead"]

_LOWEST_LOGIT = -1e4  # of pixels that are no candidates: a score of 0 and, unlike infinity, no NaN in a loss
_SMALLEST, _LARGEST = 1e-3, 1 - 1e-3  # of a normalised coordinate whose logit is taken


class PixelHead(nn.Module):
    """Predict a class and a box at every pixel of every level."""

    @configurable
    def __init__(
        self, *, dim: int, num_classes: int, prior_prob: float, anchor_size: float, relative_offsets: bool = False
    ):
        """
        Args:
            dim: model width C.
            num_classes: number of classes K.
            prior_prob: the score that every class starts with.
            anchor_size: side of the box that each pixel of the finest level starts from, as a share of the image's sides;
                doubled by each further level.
            relative_offsets: see :class:`samdetr.modeling.decoder.Decoder`.
        """
        super().__init__()
        self.anchor_size = anchor_size
        self.relative_offsets = relative_offsets
        self.projection = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP([dim, dim, dim, 4])
        nn.init.xavier_uniform_(self.projection.weight)
        start_heads_(self.class_head, self.box_head, prior_prob)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "prior_prob": node.PRIOR_PROB,
            "anchor_size": node.ANCHOR_SIZE,
            "relative_offsets": node.RELATIVE_OFFSETS,
        }

    def classify(self, levels: list[FeatureLevel]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the pixels' features (B, N, C), class logits (B, N, K), float32, lowest at padded pixels, and which pixels
        are padded, (B, N), None if none is."""
        memory, _, padding_mask = flatten_levels(levels)
        features = self.norm(self.projection(memory))
        logits = self.class_head(features).float()
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[..., None], _LOWEST_LOGIT)
        return features, logits, padding_mask

    def box_logits(self, features: Tensor, anchors: Tensor) -> Tensor:
        """Return the logits of boxes, (B, n, 4) float32, from features (B, n, C) and anchors (B, n, 4)."""
        offsets = self.box_head(features).float()
        if self.relative_offsets:
            offsets = offsets_in_boxes(offsets, anchors)
        return anchors.clamp(_SMALLEST, _LARGEST).logit() + offsets

    def anchors(self, levels: list[FeatureLevel]) -> Tensor:
        """Return the box that each pixel starts from, (B, N, 4): its own centre, and its level's size."""
        centres = pixel_points(levels)
        sizes = [self.anchor_size * 2**index for index in range(len(levels))]
        sizes = [centres.new_full((level.size[0] * level.size[1], 2), size) for level, size in zip(levels, sizes)]
        return torch.cat([centres, torch.cat(sizes).expand_as(centres)], dim=-1)

    def forward(self, levels: list[FeatureLevel]) -> Predictions:
        """Predict at every pixel, as one decoder layer does for its queries: (1, B, N, K) and (1, B, N, 4)."""
        features, logits, padding_mask = self.classify(levels)
        boxes = self.box_logits(features, self.anchors(levels)).sigmoid()
        return Predictions(logits[None], boxes[None], padding_mask)


class EncoderSelection(PixelHead):
    """Select the boxes of the pixels with the best scores as reference boxes."""

    @configurable
    def __init__(self, *, with_content: bool = False, **options):
        """
        Args:
            with_content: whether the features of the selected pixels become contents of the queries as well (as in two-stage
                Deformable DETR and Efficient DETR, https://arxiv.org/abs/2104.01318; there and here with their gradient).
            options: see :class:`PixelHead`.
        """
        super().__init__(**options)
        dim = self.projection.in_features
        self.content = nn.Linear(dim, dim) if with_content else None

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "with_content": cfg.MODEL.SAMDETR.QUERY_GENERATOR.CONTENT_FROM_ENCODER}

    def select(self, levels: list[FeatureLevel], num_queries: int) -> tuple[Tensor, Tensor | None, Predictions | None]:
        """Select reference boxes.

        Args:
            levels: the encoded image, from the finest to the coarsest level.
            num_queries: how many boxes to select, Q. Where an image has fewer pixels, the others cover the whole image.

        Returns:
            The logits of the selected boxes, (B, Q, 4) float32 without gradient, best first; the contents from their pixels
            (B, Q, C), zero where there is no pixel, or None; and, in training, the predictions of all pixels, see
            :meth:`forward`.
        """
        features, logits, padding_mask = self.classify(levels)
        # As many further candidates as queries, so that there are always enough.
        scores = nn.functional.pad(logits.detach().amax(-1), (0, num_queries), value=_LOWEST_LOGIT)
        scores, selected = scores.topk(num_queries, dim=1)
        selected = selected.clamp(max=logits.shape[1] - 1)[..., None]
        is_pixel = scores[..., None] > _LOWEST_LOGIT
        anchors = self.anchors(levels)

        def of_selected(values: Tensor) -> Tensor:
            return values.gather(1, selected.expand(-1, -1, values.shape[-1]))

        if self.training:
            all_boxes = self.box_logits(features, anchors)
            predictions = Predictions(logits[None], all_boxes.sigmoid()[None], padding_mask)
            boxes = of_selected(all_boxes.detach())
        else:
            predictions = None
            boxes = self.box_logits(of_selected(features), of_selected(anchors))
        content = None if self.content is None else self.content(of_selected(features)) * is_pixel
        whole_image = upload([0.5, 0.5, _LARGEST, _LARGEST], boxes.device).logit()
        return torch.where(is_pixel, boxes, whole_image).detach(), content, predictions


class DenseHead(PixelHead):
    """Teach backbone and encoder, in training only: each box is the target of the several pixels that fit it best."""

    @configurable
    def __init__(self, *, pixels_per_box: int, **options):
        """
        Args:
            pixels_per_box: how many pixels each box teaches.
            options: see :class:`PixelHead`.
        """
        super().__init__(**options)
        self.pixels_per_box = pixels_per_box

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "pixels_per_box": cfg.MODEL.SAMDETR.DENSE_HEAD.PIXELS_PER_BOX}

    def losses(
        self, levels: list[FeatureLevel], targets: list[ImageTarget], criterion: SetCriterion, normalizer: Tensor
    ) -> dict[str, Tensor]:
        """Return the losses ``loss_dense_class``, ``loss_dense_l1`` and ``loss_dense_giou``.

        Args:
            levels: the encoded image, from the finest to the coarsest level.
            targets: B targets.
            criterion: computes the losses.
            normalizer: the number of boxes, see :meth:`samdetr.modeling.criterion.SetCriterion.normalizers`.
        """
        predictions = self(levels)
        number = min(self.pixels_per_box, predictions.logits.shape[2])
        matches = criterion.matcher.one_to_many(predictions, targets, number)
        return criterion.losses_of_matches("loss_dense", predictions, targets, matches, normalizer * number)
