"""The small typed containers that travel between the parts of SAM-DETR.

Glossary of shapes, used in every module of this package:
    B images, Q queries, C model width, M attention heads, K classes, L decoder layers,
    H x W a feature map, N = H * W its pixels.
Boxes are (cx, cy, w, h), normalised by the image's own size (without padding), unless a name says otherwise.
Points and sizes are always in the order (x, y) and (w, h); image sizes follow detectron2: (height, width).
"""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["AlignedQuery", "DenoisingTargets", "FeatureLevel", "ImageTarget", "QueryBatch"]


@dataclass
class FeatureLevel:
    """One feature map of a batch of images, padded at the right and the bottom.

    Attributes:
        features: (B, H, W, C).
        position: (B or 1, H, W, C), the position encoding added to attention's keys; 1 if no image is padded.
        valid_size: (B, 2) float32, width and height of each image's unpadded part, in pixels of this map.
        padding_mask: (B, H, W) bool, True at padded pixels; None if no image of the batch is padded.
    """

    features: Tensor
    position: Tensor
    valid_size: Tensor
    padding_mask: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the padded map."""
        return self.features.shape[1], self.features.shape[2]


@dataclass
class ImageTarget:
    """The ground truth of one image.

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
        labels: (B, D) int64, the class of each of D denoising queries; arbitrary where ``valid`` is False.
        boxes: (B, D, 4), normalised (cx, cy, w, h).
        valid: (B, D) bool, False for slots that only pad an image with fewer boxes than another.
        num_valid: how many slots are valid, so that nobody has to ask the device.
    """

    labels: Tensor
    boxes: Tensor
    valid: Tensor
    num_valid: int


@dataclass
class QueryBatch:
    """The queries handed to the decoder: the matching queries first, then denoising queries, if any.

    Attributes:
        content: (B, Q, C) content vectors.
        reference_logits: (B, Q, 4); their sigmoid is the reference box.
        attention_mask: bool, broadcastable to (B, M, Q, Q), True where query i may attend to query j in
            self-attention; None if every query may attend to every other.
        denoising: targets of the last queries; None if there are no denoising queries.
    """

    content: Tensor
    reference_logits: Tensor
    attention_mask: Tensor | None = None
    denoising: DenoisingTargets | None = None


@dataclass
class AlignedQuery:
    """What the Semantics Aligner hands to the cross-attention.

    Attributes:
        content: (B, Q, M, C), the content query of each head.
        position: (B, Q, M, C), the position query of each head.
        keypoints: (B, Q, M, 2), each head's point (x, y) in the image, in [0, 1] inside the image.
        gaussian_scales: (B, Q, M, 2), raw (sx, sy) of each head's Gaussian; None if the cross-attention has none.
    """

    content: Tensor
    position: Tensor
    keypoints: Tensor
    gaussian_scales: Tensor | None = None
