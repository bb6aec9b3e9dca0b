"""The base model as a tree of LazyCalls, and functions that turn it into every other model of the YAML configs."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet

from samdetr.modeling.backbone import make_dc5_stages
from samdetr.modeling.baselines.cross_attention import (
    ConditionalCrossAttention,
    DeformableCrossAttention,
    MultiHeadCrossAttention,
    SMCAMultiHeadCrossAttention,
)
from samdetr.modeling.criterion import SetCriterion
from samdetr.modeling.cross_attention import CrossAttention, SMCACrossAttention
from samdetr.modeling.decoder import Decoder, DecoderLayer
from samdetr.modeling.encoder import DeformableTransformerEncoder, TransformerEncoder
from samdetr.modeling.feature_projection import FeatureProjection
from samdetr.modeling.matcher import HungarianMatcher
from samdetr.modeling.meta_arch import SAMDETR
from samdetr.modeling.pixel_head import DenseHead, EncoderSelection
from samdetr.modeling.query_generator import DenoisingQueryGenerator, LearnedQueryGenerator
from samdetr.modeling.semantics_aligner import IdentityAligner, SemanticsAligner
from samdetr.modeling.timm_backbone import TimmBackbone

DIM, NUM_HEADS, TEMPERATURE = 256, 8, 10000.0
FOCAL = {"focal_alpha": 0.25, "focal_gamma": 2.0}
RESNET = {"stride_in_1x1": False, "norm": "FrozenBN"}


def decoder_layer(dim: int = DIM, num_heads: int = NUM_HEADS, feedforward_dim: int = 2048):
    size = {"dim": dim, "num_heads": num_heads}
    return L(DecoderLayer)(
        **size,
        feedforward_dim=feedforward_dim,
        temperature=TEMPERATURE,
        aligner=L(SemanticsAligner)(
            **size, pooled_size=7, reduction=4, hidden_dims=[256, 512, 512], temperature=TEMPERATURE
        ),
        cross_attention=L(CrossAttention)(**size),
    )


model = L(SAMDETR)(
    backbone=L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
        stages=L(ResNet.make_default_stages)(depth=50, **RESNET),
        out_features="${..in_features}",
        freeze_at=2,
    ),
    in_features=["res5"],
    feature_projection=L(FeatureProjection)(
        in_channels=[2048], strides=[32], dim=DIM, num_groups=32, temperature=TEMPERATURE
    ),
    encoder=L(TransformerEncoder)(dim=DIM, num_heads=NUM_HEADS, feedforward_dim=2048, num_layers=6),
    query_generator=L(LearnedQueryGenerator)(num_queries=300, dim=DIM),
    decoder=L(Decoder)(
        layers=[decoder_layer() for _ in range(6)], dim=DIM, num_classes="${..num_classes}", prior_prob=0.01
    ),
    criterion=L(SetCriterion)(
        matcher=L(HungarianMatcher)(class_weight=2.0, l1_weight=5.0, giou_weight=2.0, **FOCAL),
        class_weight=2.0,
        l1_weight=5.0,
        giou_weight=2.0,
        **FOCAL,
    ),
    num_classes=80,
    max_detections=100,
    pixel_mean=[123.675, 116.280, 103.530],
    pixel_std=[58.395, 57.120, 57.375],
)


def make_small(model, dim: int, num_heads: int, num_queries: int, feedforward_dim: int = 256) -> None:
    """Use one encoder layer and three decoder layers, of another width."""
    model.feature_projection.dim = dim
    model.encoder.update(dim=dim, num_heads=num_heads, feedforward_dim=feedforward_dim, num_layers=1)
    model.query_generator = L(LearnedQueryGenerator)(num_queries=num_queries, dim=dim)
    model.decoder.dim = dim
    model.decoder.layers = [decoder_layer(dim, num_heads, feedforward_dim) for _ in range(3)]
    for layer in model.decoder.layers:
        layer.aligner.hidden_dims = [128, 128, 128]


def use_timm(model, name: str, channels: dict[str, int], **options) -> None:
    """Use a network of timm.

    Args:
        model: changed in place.
        name: of the network.
        channels: number of channels of each of its features to use, such as {"stride16": 112}, from the finest to the coarsest.
        options: see :class:`samdetr.modeling.timm_backbone.TimmBackbone`.
    """
    model.backbone = L(TimmBackbone)(name=name, **options)
    model.in_features = list(channels)
    strides = [int(feature.removeprefix("stride")) for feature in channels]
    model.feature_projection.update(in_channels=list(channels.values()), strides=strides)


def use_dc5(model) -> None:
    """Use res5 at stride 16."""
    model.backbone.stages = L(make_dc5_stages)(depth=50, **RESNET)
    model.feature_projection.strides = [16]


def use_deformable_encoder(model, feedforward_dim: int = 1024) -> None:
    """Use Deformable DETR's encoder."""
    encoder = model.encoder
    size = {"dim": encoder.dim, "num_heads": encoder.num_heads, "num_layers": encoder.num_layers}
    num_levels = len(model.in_features)
    model.encoder = L(DeformableTransformerEncoder)(
        **size, feedforward_dim=feedforward_dim, num_levels=num_levels, num_points=4
    )


def use_three_levels(model) -> None:
    """Use res3 to res5 and the deformable encoder, as SAM-DETR++ does."""
    model.in_features = ["res3", "res4", "res5"]
    model.feature_projection.update(in_channels=[512, 1024, 2048], strides=[8, 16, 32])
    use_deformable_encoder(model)


def use_no_projection_norm(model) -> None:
    """Leave out the norm after the projection, as the published single-scale 50-epoch models do."""
    model.feature_projection.num_groups = 0


def use_cross_attention(model, attention, **options) -> None:
    """Use a cross-attention of CROSS_ATTENTION_REGISTRY in every decoder layer."""
    for layer in model.decoder.layers:
        layer.cross_attention = L(attention)(dim=layer.dim, num_heads=layer.num_heads, **options)
        layer.aligner.predict_scales = "gaussian_beta" in options or getattr(attention, "needs_scales", None) is True


def use_smca(model) -> None:
    use_cross_attention(model, SMCACrossAttention, gaussian_beta=8.0)


def use_denoising(model, num_groups: int = 5, max_denoising_queries: int = 500) -> None:
    """Add DN-DETR's denoising queries."""
    queries = model.query_generator
    model.query_generator = L(DenoisingQueryGenerator)(
        num_queries=queries.num_queries,
        dim=queries.dim,
        num_classes="${..num_classes}",
        num_groups=num_groups,
        max_denoising_queries=max_denoising_queries,
        box_noise=0.4,
        label_noise=0.2,
    )


def pixel_head_options(model, anchor_size: float) -> dict:
    return {"dim": model.decoder.dim, "prior_prob": 0.01, "anchor_size": anchor_size}


def use_encoder_selection(model, anchor_size: float = 0.05, with_content: bool = False) -> None:
    """Select the reference boxes, and perhaps contents, in the encoded image."""
    options = {**pixel_head_options(model, anchor_size), "with_content": with_content}
    model.query_generator.selection = L(EncoderSelection)(**options, num_classes="${...num_classes}")


def use_dense_head(model, anchor_size: float = 0.05) -> None:
    """Add a dense head, which is used in training only."""
    options = pixel_head_options(model, anchor_size)
    model.dense_head = L(DenseHead)(**options, num_classes="${..num_classes}", pixels_per_box=4)


def use_relative_offsets(model) -> None:
    """Predict offsets of centres in units of the reference box. To be called after the two above."""
    for part in filter(None, (model.decoder, model.query_generator.get("selection"), model.get("dense_head"))):
        part.relative_offsets = True


def use_pooled_content(model) -> None:
    """Give the queries' contents what the keypoint search sees."""
    for layer in model.decoder.layers:
        layer.aligner.pooled_content = True


def use_no_aligner(model, attention, refine_boxes: bool, **options) -> None:
    """Make an ablation: queries as they are, and another cross-attention (docs/baselines.md)."""
    for layer in model.decoder.layers:
        layer.aligner = L(IdentityAligner)(dim=layer.dim, num_heads=layer.num_heads, temperature=layer.temperature)
    use_cross_attention(model, attention, **options)
    model.decoder.refine_boxes = refine_boxes


def make_multi_head(model) -> None:
    use_no_aligner(model, MultiHeadCrossAttention, refine_boxes=False)


def make_conditional(model) -> None:
    use_no_aligner(model, ConditionalCrossAttention, refine_boxes=False)


def make_conditional_refined(model) -> None:
    use_no_aligner(model, ConditionalCrossAttention, refine_boxes=True)


def make_smca_multi_head(model) -> None:
    use_no_aligner(model, SMCAMultiHeadCrossAttention, refine_boxes=False, gaussian_beta=8.0)


def make_deformable(model) -> None:
    use_deformable_encoder(model)
    num_levels = len(model.in_features)
    use_no_aligner(model, DeformableCrossAttention, refine_boxes=False, num_levels=num_levels, num_points=4)
    for layer in model.decoder.layers:
        layer.feedforward_dim = 1024
