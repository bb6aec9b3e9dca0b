"""Sparse R-CNN: learned proposals and dynamic instance interaction (Sun et al. 2021, https://arxiv.org/abs/2011.12450).

A fixed number of learned proposals, a box and a feature vector each, go through a series of stages. A stage pools the features
inside each box from a feature pyramid, lets them interact with the proposal's own feature by layers that this feature
generates, and predicts classes and a better box, which the next stage starts from.

Shapes: B images, Q proposals, C model width, D channels between the dynamic layers, S x S bins of RoIAlign, L stages.
"""

import math

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor, nn

from ...errors import UserError
from ...ops.runtime import run_layer, upload
from ..boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from ..layers import FeedForward, xavier_uniform_matrices_
from ..meta_arch import SetDetector, used_features
from ..structures import ImageTarget, Predictions

__all__ = ["DynamicInteraction", "LearnedProposals", "Pyramid", "SparseRCNN", "SparseStage", "SparseStages"]

_LARGEST_CHANGE = math.log(100000 / 16)  # of the logarithm of a size, as published

# A feature pyramid: maps (B, C, H, W), from the finest, and the images' heights and widths without padding, (B, 2) in pixels.
Pyramid = tuple[list[Tensor], Tensor]


@META_ARCH_REGISTRY.register()
class SparseRCNN(SetDetector):
    """Sparse R-CNN. There is no encoder."""

    @configurable
    def __init__(self, *, proposals: "LearnedProposals", decoder: "SparseStages", **options):
        """
        Args:
            proposals, decoder: the learned proposals, and the stages that they go through.
            options: see :class:`SetDetector`; the features are those of the pyramid.
        """
        super().__init__(**options)
        self.proposals = proposals
        self.decoder = decoder
        self.query_generator = None
        self.dense_head = None

    @classmethod
    def from_config(cls, cfg):
        node, pooling = cfg.MODEL.SAMDETR, cfg.MODEL.ROI_BOX_HEAD
        parts = cls.shared_parts(cfg)
        shapes = used_features(cfg, parts["backbone"])
        if any(shape.channels != node.HIDDEN_DIM for shape in shapes):
            raise UserError(
                f"MODEL.SAMDETR.HIDDEN_DIM is {node.HIDDEN_DIM}, but the features have "
                f"{sorted({shape.channels for shape in shapes})} channels: SparseRCNN needs a feature pyramid of as many "
                "(MODEL.FPN.OUT_CHANNELS)."
            )
        stages = [
            SparseStage(
                dim=node.HIDDEN_DIM,
                num_heads=node.NUM_HEADS,
                feedforward_dim=node.DECODER.FEEDFORWARD_DIM,
                dynamic_dim=node.DECODER.DYNAMIC_DIM,
                pooled_size=pooling.POOLER_RESOLUTION,
                num_classes=node.NUM_CLASSES,
                prior_prob=node.PRIOR_PROB,
            )
            for _ in range(node.DECODER.NUM_LAYERS)
        ]
        return {
            **parts,
            "proposals": LearnedProposals(num_proposals=node.NUM_QUERIES, dim=node.HIDDEN_DIM),
            "decoder": SparseStages(
                stages=stages,
                pooler=make_pooler(shapes, pooling.POOLER_RESOLUTION, pooling.POOLER_SAMPLING_RATIO),
                box_weights=tuple(pooling.BBOX_REG_WEIGHTS),
                recompute=node.ACTIVATION_CHECKPOINTING,
            ),
        }

    def encode(self, images: Tensor, image_sizes: list[tuple[int, int]]) -> Pyramid:
        """Return the feature pyramid of normalised images, (B, 3, H, W), whose heights and widths are without padding."""
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return [features[name] for name in self.in_features], upload(image_sizes, images.device, torch.float32)

    def decode(self, encoded: Pyramid, targets: list[ImageTarget] | None = None) -> tuple[Predictions, None]:
        """Predict from the feature pyramid; see :class:`SetDetector`."""
        features = self.proposals.features.expand(len(encoded[1]), -1, -1)
        return self.decoder(features, self.proposals.boxes, encoded), None


def make_pooler(shapes: list[ShapeSpec], pooled_size: int, sampling_ratio: int) -> ROIPooler:
    """Make detectron2's RoIAlign of the pyramid's level that fits each box's size."""
    return ROIPooler(
        output_size=pooled_size,
        scales=[1 / shape.stride for shape in shapes],
        sampling_ratio=sampling_ratio,
        pooler_type="ROIAlignV2",
    )


class LearnedProposals(nn.Module):
    """Proposal boxes and features, the same for all images.

    Attributes:
        boxes: (Q, 4), normalised (cx, cy, w, h); each starts as the whole image, as published.
        features: (Q, C).
    """

    def __init__(self, *, num_proposals: int, dim: int):
        super().__init__()
        self.boxes = nn.Parameter(torch.tensor([0.5, 0.5, 1.0, 1.0]).repeat(num_proposals, 1))
        self.features = nn.Parameter(torch.randn(num_proposals, dim))


class DynamicInteraction(nn.Module):
    """Let pooled features go through two layers whose weights are generated from the proposal's feature."""

    def __init__(self, *, dim: int, dynamic_dim: int, pooled_size: int):
        """
        Args:
            dim: model width C.
            dynamic_dim: channels D between the two layers.
            pooled_size: bins S of RoIAlign along each side.
        """
        super().__init__()
        self.dynamic_dim = dynamic_dim
        self.weights = nn.Linear(dim, 2 * dim * dynamic_dim)
        self.norm_inside = nn.LayerNorm(dynamic_dim)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim * pooled_size**2, dim)
        self.output_norm = nn.LayerNorm(dim)

    def forward(self, proposals: Tensor, pooled: Tensor) -> Tensor:
        """Map proposal features (n, C) and pooled features (n, S * S, C) to (n, C)."""
        first, second = self.weights(proposals).chunk(2, dim=-1)
        x = self.norm_inside(pooled @ first.unflatten(-1, (-1, self.dynamic_dim))).relu()
        x = self.norm(x @ second.unflatten(-1, (self.dynamic_dim, -1))).relu()
        return self.output_norm(self.output(x.flatten(1))).relu()


def make_tower(dim: int, num_layers: int) -> nn.Sequential:
    """Make the layers between a stage's features and a prediction."""
    layers = [(nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()) for _ in range(num_layers)]
    return nn.Sequential(*(part for layer in layers for part in layer))


class SparseStage(nn.Module):
    """One stage: self-attention among the proposals, dynamic interaction, feed-forward network, prediction."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dynamic_dim: int,
        pooled_size: int,
        num_classes: int,
        prior_prob: float,
        num_class_layers: int = 1,
        num_box_layers: int = 3,
    ):
        """
        Args:
            dim: model width C.
            num_heads: attention heads, dividing C.
            feedforward_dim: hidden width of the feed-forward network.
            dynamic_dim, pooled_size: see :class:`DynamicInteraction`.
            num_classes: number of classes K.
            prior_prob: the score that every class starts with.
            num_class_layers, num_box_layers: layers before the prediction of classes and of boxes, as published.
        """
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.interaction = DynamicInteraction(dim=dim, dynamic_dim=dynamic_dim, pooled_size=pooled_size)
        self.interaction_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)
        self.class_head = nn.Sequential(make_tower(dim, num_class_layers), nn.Linear(dim, num_classes))
        self.box_head = nn.Sequential(make_tower(dim, num_box_layers), nn.Linear(dim, 4))
        xavier_uniform_matrices_(self)
        nn.init.constant_(self.class_head[-1].bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Update the proposals.

        Args:
            features: (B, Q, C).
            pooled: (B * Q, S * S, C), what RoIAlign found in the proposals' boxes.

        Returns:
            New features (B, Q, C), class logits (B, Q, K) and box deltas (B, Q, 4), both float32.
        """
        attended, _ = self.self_attention(features, features, features, need_weights=False)
        features = self.self_attention_norm(features + attended)
        changes = self.interaction(features.flatten(0, 1), pooled).view_as(features)
        features = self.feedforward(self.interaction_norm(features + changes))
        return features, self.class_head(features).float(), self.box_head(features).float()


class SparseStages(nn.Module):
    """The stages one after the other; each starts from the boxes and features of the one before."""

    def __init__(
        self,
        *,
        stages: list[nn.Module],
        pooler: ROIPooler,
        box_weights: tuple[float, float, float, float],
        recompute: bool = False,
    ):
        """
        Args:
            stages: L stages, each called like :class:`SparseStage`.
            pooler: detectron2's pooler for the pyramid.
            box_weights: divisors of the deltas of a box's x, y, w and h.
            recompute: whether to recompute each stage's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.layers = nn.ModuleList(stages)
        self.pooler = pooler
        self.box_transform = Box2BoxTransform(box_weights, scale_clamp=_LARGEST_CHANGE)
        self.recompute = recompute

    def forward(self, features: Tensor, boxes: Tensor, pyramid: Pyramid) -> Predictions:
        """Decode.

        Args:
            features: proposal features (B, Q, C).
            boxes: proposal boxes (Q, 4), normalised (cx, cy, w, h).
            pyramid: see :data:`Pyramid`.

        Returns:
            The predictions of all stages.
        """
        maps, sizes = pyramid
        maps = [each.float() for each in maps]  # detectron2's RoIAlign rounds boxes to the type of the maps
        sizes = sizes.flip(-1).repeat(1, 2)[:, None]  # (B, 1, 4): width and height twice
        corners = cxcywh_to_xyxy(boxes.float()) * sizes  # (B, Q, 4), in pixels of the image
        all_logits, all_boxes = [], []
        for stage in self.layers:
            pooled = self.pooler(maps, [Boxes(each) for each in corners.detach()])
            pooled = pooled.flatten(2).transpose(1, 2)
            features, logits, deltas = run_layer(stage, features, pooled, recompute=self.recompute)
            refined = self.box_transform.apply_deltas(deltas.flatten(0, 1), corners.flatten(0, 1))
            refined = refined.view_as(corners)
            all_logits.append(logits)
            all_boxes.append(xyxy_to_cxcywh(refined / sizes))
            corners = refined.detach()
        return Predictions(torch.stack(all_logits), torch.stack(all_boxes))
