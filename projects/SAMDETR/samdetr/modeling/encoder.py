"""Encoders: from projected feature maps to the memory that the decoder attends to (paper section 3.1).

Shapes: B images, C model width, M heads, V levels, N pixels of all levels together.
"""

from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.attention import mask_as_bias
from ..ops.runtime import autocast_dtype, run_layer
from .deformable_attention import MultiScaleDeformableAttention
from .layers import FeedForward, xavier_uniform_matrices_
from .levels import flatten_levels, pixel_points, points_in_padded_maps, replace_features
from .structures import FeatureLevel

__all__ = ["ENCODER_REGISTRY", "DeformableTransformerEncoder", "TransformerEncoder", "build_encoder"]

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Registry of encoders, chosen by ``cfg.MODEL.SAMDETR.ENCODER.NAME``.

A registered class is called as ``Encoder(cfg)``. The resulting module is called with a list of :class:`FeatureLevel`, in
the order of ``MODEL.SAMDETR.IN_FEATURES``, and returns as many levels in the same order, with new ``features`` of the
same shape. An unpadded pixel must not depend on padded ones.
"""


def build_encoder(cfg) -> nn.Module:
    """Build the encoder that ``cfg.MODEL.SAMDETR.ENCODER.NAME`` names."""
    return ENCODER_REGISTRY.get(cfg.MODEL.SAMDETR.ENCODER.NAME)(cfg)


class PixelSelfAttention(nn.MultiheadAttention):
    """torch's attention, with its parameters, for queries that are the keys: the same output in half as many operations."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__(dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, position: Tensor, bias: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: (B, N, C).
            position: (B or 1, N, C), added to queries and keys.
            bias: (B, 1, 1, N), added to the logits; None for zeros.

        Returns:
            (B, N, C).
        """
        rows = [2 * self.embed_dim, self.embed_dim]
        weight, value_weight = self.in_proj_weight.split(rows)
        linear_bias, value_bias = self.in_proj_bias.split(rows)
        queries_and_keys = F.linear(x + position, weight, linear_bias).unflatten(-1, (2, self.num_heads, -1))
        q, k = queries_and_keys.permute(2, 0, 3, 1, 4).unbind()
        v = F.linear(x, value_weight, value_bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each followed by residual and LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.self_attention = PixelSelfAttention(dim=dim, num_heads=num_heads)
        self.norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)
        xavier_uniform_matrices_(self.self_attention)

    def forward(self, x: Tensor, position: Tensor, bias: Tensor | None) -> Tensor:
        """Map (B, N, C) to (B, N, C); see :meth:`PixelSelfAttention.forward`."""
        return self.feedforward(self.norm(x + self.self_attention(x, position, bias)))


@ENCODER_REGISTRY.register()
class TransformerEncoder(nn.Module):
    """DETR's encoder: every pixel attends to every other pixel (of all levels, if there are several)."""

    @configurable
    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int, num_layers: int, recompute: bool = False):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
            feedforward_dim: hidden width of the feed-forward networks.
            num_layers: number of layers, 0 or more.
            recompute: whether to recompute each layer's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            TransformerEncoderLayer(dim=dim, num_heads=num_heads, feedforward_dim=feedforward_dim)
            for _ in range(num_layers)
        )

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "dim": node.HIDDEN_DIM,
            "num_heads": node.NUM_HEADS,
            "feedforward_dim": node.ENCODER.FEEDFORWARD_DIM,
            "num_layers": node.ENCODER.NUM_LAYERS,
            "recompute": node.ACTIVATION_CHECKPOINTING,
        }

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        """Encode the levels; see :data:`ENCODER_REGISTRY`."""
        memory, position, mask = flatten_levels(levels)
        bias = None if mask is None else mask_as_bias(mask[:, None, None], autocast_dtype(memory))
        for layer in self.layers:
            memory = run_layer(layer, memory, position, bias, recompute=self.recompute)
        return replace_features(levels, memory)


class DeformableTransformerEncoderLayer(nn.Module):
    """Multi-scale deformable attention and feed-forward network, each followed by residual and LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int, num_levels: int, num_points: int):
        super().__init__()
        self.self_attention = MultiScaleDeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )
        self.norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_points: Tensor,
        level_sizes: list[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Map (B, N, C) to (B, N, C); see :meth:`MultiScaleDeformableAttention.forward`."""
        attended = self.self_attention(x + position, reference_points, x, level_sizes, padding_mask)
        return self.feedforward(self.norm(x + attended))


@ENCODER_REGISTRY.register()
class DeformableTransformerEncoder(nn.Module):
    """Deformable DETR's encoder, over any number of levels."""

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        num_layers: int,
        num_levels: int,
        num_points: int,
        recompute: bool = False,
    ):
        """
        Args:
            dim, num_heads, feedforward_dim, num_layers, recompute: see :class:`TransformerEncoder`.
            num_levels: number of feature levels V.
            num_points: number of points of each head in each level.
        """
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(
            DeformableTransformerEncoderLayer(
                dim=dim,
                num_heads=num_heads,
                feedforward_dim=feedforward_dim,
                num_levels=num_levels,
                num_points=num_points,
            )
            for _ in range(num_layers)
        )

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            **TransformerEncoder.from_config(cfg),
            "num_levels": len(node.IN_FEATURES),
            "num_points": node.ENCODER.NUM_POINTS,
        }

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        """Encode the levels; see :data:`ENCODER_REGISTRY`. Each pixel looks around its own place in every level."""
        memory, position, mask = flatten_levels(levels)
        reference_points = points_in_padded_maps(pixel_points(levels)[:, :, None], levels)  # (B, N, 1, V, 2)
        sizes = [level.size for level in levels]
        for layer in self.layers:
            memory = run_layer(layer, memory, position, reference_points, sizes, mask, recompute=self.recompute)
        return replace_features(levels, memory)
