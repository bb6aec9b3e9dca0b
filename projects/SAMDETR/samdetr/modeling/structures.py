"""The small typed containers that the parts of SAM-DETR exchange.

Glossary of shapes, used in every module of this package:
    B images, Q queries, C model width, M attention heads, K classes, L decoder layers, V feature levels,
    H x W a feature map, N = H * W its pixels (or the pixels of all levels).
Boxes are (cx, cy, w, h), normalised by the image's own size (without padding), unless a name says otherwise.
Points are (x, y); sizes are (height, width), as in detectron2 and torch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention import mask_as_bias

__all__ = ["AlignedQuery", "DenoisingTargets", "FeatureLevel", "ImageTarget", "Predictions", "QueryBatch"]


@dataclass
class FeatureLevel:
    """One feature map of a batch of images, padded at the right and at the bottom.

    Attributes:
        features: (B, H, W, C).
        position: (B or 1, H, W, C), position encoding that is added to attention's keys; 1 if no image is padded.
        valid_size: (B, 2) float32, height and width of each image's unpadded part, in pixels of this map.
        padding_mask: (B, H, W) bool, True at padded pixels; None if no image of the batch is padded.
    """

    features: Tensor
    position: Tensor
    valid_size: Tensor
    padding_mask: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the map, padding included."""
        return self.features.shape[1], self.features.shape[2]

    def in_pixels(self, points: Tensor) -> Tensor:
        """Scale points (B, Q, M, 2), from 0 to 1 inside the valid image, to pixels of this map; float32."""
        return points.float() * self.valid_size.flip(-1)[:, None, None]


@dataclass
class ImageTarget:
    """The ground truth of one image with n boxes.

    Attributes:
        labels: (n,) int64 in [0, K).
        boxes: (n, 4) float32, normalised (cx, cy, w, h).
    """

    labels: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class DenoisingTargets:
    """What the denoising queries of a batch have to predict; they need no matching.

    Attributes:
        labels: (B, Q_dn) int64, the class of each of Q_dn denoising queries; arbitrary where ``valid`` is False.
        boxes: (B, Q_dn, 4), normalised (cx, cy, w, h).
        valid: (B, Q_dn) bool, False for slots that only pad an image with fewer boxes than another.
        negative: (Q_dn,) bool, True for queries that have so much noise that they are background; None if none has.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    negative: Tensor | None = None


@dataclass
class QueryBatch:
    """The decoder's queries: the matching queries first, then the denoising queries, if there are any.

    Attributes:
        content: (B, Q, C) content vectors; Q counts matching and denoising queries together.
        reference_logits: (B, Q, 4); their sigmoid is the reference box.
        attention_mask: bool, broadcastable to (B, M, Q, Q), True where query i may attend to query j in
            self-attention; None if every query may attend to every other.
        denoising: targets of the last queries; None if there are no denoising queries.
        proposals: what the reference boxes were selected from, to be matched and to learn like the predictions of one more
            decoder layer, with each of N pixels in place of a query; None if nothing was selected, or outside training.
        position: (B or 1, Q, C), learned position embeddings; None where they follow from the reference boxes.
    """

    content: Tensor
    reference_logits: Tensor
    attention_mask: Tensor | None = None
    denoising: DenoisingTargets | None = None
    proposals: "Predictions | None" = None
    position: Tensor | None = None

    def attention_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return what self-attention adds to its logits: 0, or minus infinity where a query may not attend; None for zeros."""
        if self.attention_mask is None:
            return None
        return mask_as_bias(~self.attention_mask, dtype)


@dataclass
class AlignedQuery:
    """What the Semantics Aligner hands to the cross-attention.

    Attributes:
        content: (B, Q, M, C), the content query of each head.
        position: (B, Q, M, C), the position query of each head.
        keypoints: (B, Q, M, 2), the point (x, y) of each head, from 0 to 1 inside the valid image; a box that reaches over its
            edge may have points outside.
        gaussian_scales: (B, Q, M, 2), raw scales (sx, sy) of each head's Gaussian; None if the cross-attention has none.
        residual: (B, Q, C), added to the query contents together with what the cross-attention returns; None for nothing.
    """

    content: Tensor
    position: Tensor
    keypoints: Tensor
    gaussian_scales: Tensor | None = None
    residual: Tensor | None = None


@dataclass
class Predictions:
    """What every decoder layer predicts, in the order of the queries.

    Attributes:
        logits: (L, B, Q, K) float32 class logits.
        boxes: (L, B, Q, 4) float32, normalised (cx, cy, w, h).
        is_padding: (B, Q) bool, True for padded pixels among the pixels that stand in place of queries: they are matched last,
            and learn nothing; None if there are none.
    """

    logits: Tensor
    boxes: Tensor
    is_padding: Tensor | None = None

    def of_queries(self, queries: slice) -> "Predictions":
        """Return the predictions of some of the queries."""
        return Predictions(self.logits[:, :, queries], self.boxes[:, :, queries])
