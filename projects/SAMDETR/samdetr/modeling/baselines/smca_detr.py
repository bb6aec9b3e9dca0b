"""SMCA-DETR: DETR with spatially modulated co-attention (Gao et al. 2021, https://arxiv.org/abs/2101.07448).

Each object query predicts a centre, and in every decoder layer an offset and a scale for each head. They make a Gaussian over
the image, which multiplies the head's attention. With several levels, the encoder attends within each level and, in its middle
layer, across all of them; the decoder attends to each level by itself, and each query weights the levels.

Shapes: B images, Q queries, C model width, M heads, V levels, H x W a level, N = H * W its pixels, L decoder layers.
"""

import math

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops.runtime import run_layer
from ..feature_projection import FeatureProjection
from ..layers import MLP, start_heads_, start_projections_, xavier_uniform_matrices_
from ..levels import flatten_levels, replace_features
from ..meta_arch import SAMDETR
from ..structures import FeatureLevel, ImageTarget, Predictions, QueryBatch

__all__ = [
    "SMCADETR",
    "DownsamplingProjection",
    "ObjectQueries",
    "SMCADecoder",
    "SMCAEncoder",
    "SpatiallyModulatedAttention",
]

_SPREAD = 4.0  # pixels by which the heads' Gaussians may start off the query's centre, along each axis


@META_ARCH_REGISTRY.register()
class SMCADETR(SAMDETR):
    """SMCA-DETR, single-scale or, if ``MODEL.SAMDETR.IN_FEATURES`` names several features, multi-scale.

    The multi-scale one adds a level at half the size of the coarsest feature.
    """

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        num_levels = len(node.IN_FEATURES)
        if num_levels > 1:
            num_levels += 1
            parts = cls.shared_parts(cfg, DownsamplingProjection)
        else:
            parts = cls.shared_parts(cfg)
        widths = {"dim": node.HIDDEN_DIM, "num_heads": node.NUM_HEADS, "dropout": node.DROPOUT}
        encoder_layers = [
            SMCAEncoderLayer(**widths, feedforward_dim=node.ENCODER.FEEDFORWARD_DIM)
            for _ in range(node.ENCODER.NUM_LAYERS)
        ]
        decoder_layers = [
            SMCADecoderLayer(
                **widths,
                feedforward_dim=node.DECODER.FEEDFORWARD_DIM,
                num_levels=num_levels,
                gaussian_beta=node.CROSS_ATTENTION.GAUSSIAN_BETA,
            )
            for _ in range(node.DECODER.NUM_LAYERS)
        ]
        recompute = node.ACTIVATION_CHECKPOINTING
        return {
            **parts,
            "encoder": SMCAEncoder(layers=encoder_layers, recompute=recompute),
            "query_generator": ObjectQueries(num_queries=node.NUM_QUERIES, dim=node.HIDDEN_DIM),
            "decoder": SMCADecoder(
                layers=decoder_layers,
                dim=node.HIDDEN_DIM,
                num_classes=node.NUM_CLASSES,
                prior_prob=node.PRIOR_PROB,
                recompute=recompute,
            ),
        }


class DownsamplingProjection(FeatureProjection):
    """:class:`FeatureProjection` with one more level: every second pixel of the coarsest feature, as in detectron2's FPN.

    The two levels share their projection.
    """

    def __init__(self, *, in_channels: list[int], strides: list[int], **options):
        """See :class:`FeatureProjection`, without the further level."""
        super().__init__(in_channels=[*in_channels, in_channels[-1]], strides=[*strides, 2 * strides[-1]], **options)
        self.projections[-1] = self.projections[-2]

    def forward(self, features: list[Tensor], image_sizes: list[tuple[int, int]] | None) -> list[FeatureLevel]:
        return super().forward([*features, features[-1][..., ::2, ::2]], image_sizes)


def make_feedforward(dim: int, hidden_dim: int, dropout: float) -> nn.Sequential:
    """Make a transformer layer's feed-forward network, without residual and norm."""
    return nn.Sequential(nn.Linear(dim, hidden_dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden_dim, dim))


class AddAndNorm(nn.LayerNorm):
    """What follows every part of a layer: dropout, residual, LayerNorm."""

    def __init__(self, dim: int, dropout: float):
        super().__init__(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        return super().forward(x + self.dropout(change))


class SMCAEncoderLayer(nn.Module):
    """DETR's encoder layer."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.feedforward = make_feedforward(dim, feedforward_dim, dropout)
        self.feedforward_norm = AddAndNorm(dim, dropout)
        xavier_uniform_matrices_(self)

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``position`` (B or 1, N, C) is added to queries and keys."""
        q = x + position
        attended, _ = self.self_attention(q, q, x, key_padding_mask=padding_mask, need_weights=False)
        x = self.self_attention_norm(x, attended)
        return self.feedforward_norm(x, self.feedforward(x))


class SMCAEncoder(nn.Module):
    """Self-attention within each level and, in the middle layer, across all levels; a layer's weights serve every level."""

    def __init__(self, *, layers: list[nn.Module], recompute: bool = False):
        """
        Args:
            layers: each called like :class:`SMCAEncoderLayer`; the published multi-scale model has 5.
            recompute: whether to recompute each layer's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        """Encode the levels; see :data:`samdetr.modeling.encoder.ENCODER_REGISTRY`."""
        for i, layer in enumerate(self.layers):
            groups = [levels] if i == len(self.layers) // 2 else [[level] for level in levels]
            levels = [encoded for group in groups for encoded in self.encode_together(layer, group)]
        return levels

    def encode_together(self, layer: nn.Module, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        """Let every pixel of some levels attend to all of their pixels."""
        return replace_features(levels, run_layer(layer, *flatten_levels(levels), recompute=self.recompute))


class ObjectQueries(nn.Module):
    """DETR's object queries, learned vectors, with the centre that each predicts ("Dynamic spatial weight maps")."""

    def __init__(self, *, num_queries: int, dim: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(num_queries, dim))
        self.centre_head = MLP([dim, dim, 2])

    def num_denoising(self, targets: list[ImageTarget]) -> int:
        """Return 0: there are no denoising queries."""
        return 0

    def forward(self, levels: list[FeatureLevel], targets: list[ImageTarget] | None = None) -> QueryBatch:
        """Make the queries; contents start at zero, and reference boxes have the predicted centres and logits 0 as sizes."""
        batch = levels[0].features.shape[0]
        logits = F.pad(self.centre_head(self.embedding), (0, 2))
        return QueryBatch(
            content=torch.zeros_like(self.embedding).expand(batch, -1, -1),
            reference_logits=logits.expand(batch, -1, -1),
            position=self.embedding[None],
        )


class SpatiallyModulatedAttention(nn.Module):
    """Multi-head attention to every level, multiplied by a Gaussian of each head, as the paper's section on
    SMCA defines it.

    Of a query o with centre c, head i attends to level j by ``C_ij = softmax(q k / sqrt(C / M) + log G_ij) v``, with
    ``log G_ij = -(s_x^2 (x - c_x - d_x)^2 + s_y^2 (y - c_y - d_y)^2) / beta`` at the pixel (x, y), and offsets d and
    scales s linear in o. The levels' results are averaged with the weights ``softmax(linear(o))``. Here s is the
    reciprocal of the paper's scale, so that no Gaussian is infinitely narrow. Pixels are those of the finest level, in
    every level.
    """

    def __init__(self, *, dim: int, num_heads: int, num_levels: int, gaussian_beta: float, dropout: float):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
            num_levels: levels V.
            gaussian_beta: beta above, in squared pixels of the finest level.
            dropout: probability of dropout of the attention weights.
        """
        super().__init__()
        self.num_heads = num_heads
        self.gaussian_beta = gaussian_beta
        self.dropout = dropout
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.offsets = nn.Linear(dim, 2 * num_heads)
        self.scales = nn.Linear(dim, 2 * num_heads)
        self.level_logits = nn.Linear(dim, num_levels) if num_levels > 1 else None
        xavier_uniform_matrices_(self)
        start_projections_(self.query, self.key, self.value)
        nn.init.zeros_(self.output.bias)
        for linear in (self.offsets, self.scales):  # queries differ in their centres alone
            nn.init.zeros_(linear.weight)
        nn.init.uniform_(self.offsets.bias, -_SPREAD, _SPREAD)
        nn.init.ones_(self.scales.bias)

    def forward(self, query: Tensor, centres: Tensor, levels: list[FeatureLevel]) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, C), content and position.
            centres: (B, Q, 2), (x, y) in [0, 1] inside the valid image.
            levels: V levels, from the finest to the coarsest.

        Returns:
            (B, Q, C).
        """
        q, dropout = self.split_heads(self.query(query)), self.dropout if self.training else 0.0
        attended = []
        for level in levels:
            k = self.split_heads((self.key(level.features + level.position)).flatten(1, 2))
            v = self.split_heads(self.value(level.features).flatten(1, 2))
            bias = self.log_gaussians(query, centres, level, levels[0]).clamp(min=-6e4).to(q.dtype)  # finite in float16
            if level.padding_mask is not None:
                bias = bias.masked_fill(level.padding_mask.flatten(1)[:, None, None], -math.inf)
            by_head = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
            attended.append(by_head.transpose(1, 2).flatten(2))
        if self.level_logits is None:
            return self.output(attended[0])
        weights = self.level_logits(query).softmax(-1)[..., None, :]
        return self.output((torch.stack(attended, dim=-1) * weights).sum(-1))

    def log_gaussians(self, query: Tensor, centres: Tensor, level: FeatureLevel, finest: FeatureLevel) -> Tensor:
        """Return the logarithm of each head's Gaussian at each pixel of a level: (B, M, Q, N) float32."""
        offsets, scales = (
            linear(query).float().unflatten(-1, (self.num_heads, 2)) for linear in (self.offsets, self.scales)
        )
        centres = finest.in_pixels(centres[:, :, None]) + offsets  # (B, Q, M, 2)
        ratio = finest.valid_size / level.valid_size  # (B, 2), height and width of the level's pixels
        parts = []
        for axis, length in enumerate(level.size[::-1]):  # x, then y
            pixels = (torch.arange(length, device=ratio.device) + 0.5) * ratio[:, 1 - axis, None]
            distances = pixels[:, None, None] - centres[..., axis, None]
            parts.append((scales[..., axis, None] * distances).square())
        x, y = parts  # (B, Q, M, W) and (B, Q, M, H)
        return -(x[..., None, :] + y[..., None]).flatten(-2).transpose(1, 2) / self.gaussian_beta

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, n, C) to (B, M, n, C / M)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SMCADecoderLayer(nn.Module):
    """DETR's decoder layer with :class:`SpatiallyModulatedAttention`."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        num_levels: int,
        gaussian_beta: float,
    ):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.self_attention_norm = AddAndNorm(dim, dropout)
        self.feedforward = make_feedforward(dim, feedforward_dim, dropout)
        self.feedforward_norm = AddAndNorm(dim, dropout)
        xavier_uniform_matrices_(self)
        self.cross_attention = SpatiallyModulatedAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, gaussian_beta=gaussian_beta, dropout=dropout
        )
        self.cross_attention_norm = AddAndNorm(dim, dropout)

    def forward(self, content: Tensor, position: Tensor, centres: Tensor, levels: list[FeatureLevel]) -> Tensor:
        """Update the contents, (B, Q, C); positions are (B or 1, Q, C), centres (B, Q, 2)."""
        q = content + position
        attended, _ = self.self_attention(q, q, content, need_weights=False)
        content = self.self_attention_norm(content, attended)
        content = self.cross_attention_norm(content, self.cross_attention(content + position, centres, levels))
        return self.feedforward_norm(content, self.feedforward(content))


class SMCADecoder(nn.Module):
    """DETR's decoder, whose layers share their prediction heads; boxes are relative to the queries' predicted centres."""

    def __init__(
        self, *, layers: list[nn.Module], dim: int, num_classes: int, prior_prob: float, recompute: bool = False
    ):
        """
        Args:
            layers: the L decoder layers, each called like :class:`SMCADecoderLayer`.
            dim, num_classes, prior_prob, recompute: see :class:`samdetr.modeling.decoder.Decoder`.
        """
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP([dim, dim, dim, 4])
        start_heads_(self.class_head, self.box_head, prior_prob)

    def forward(self, queries: QueryBatch, levels: list[FeatureLevel]) -> Predictions:
        """Decode; see :meth:`samdetr.modeling.decoder.Decoder.forward`."""
        content, reference_logits = queries.content, queries.reference_logits.float()
        centres = reference_logits[..., :2].sigmoid()
        contents = []
        for layer in self.layers:
            content = run_layer(layer, content, queries.position, centres, levels, recompute=self.recompute)
            contents.append(content)
        output = self.norm(torch.stack(contents))
        boxes = (reference_logits + self.box_head(output).float()).sigmoid()
        return Predictions(self.class_head(output).float(), boxes)
