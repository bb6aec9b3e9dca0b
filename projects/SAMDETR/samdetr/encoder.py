"""Encoders: from projected feature maps to the memory that the decoder attends to (paper section 3.1).

Shapes: B images, C model width, M heads, H x W a feature map, N pixels of all levels together.
"""

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .deformable_attention import MultiScaleDeformableAttention
from .layers import FeedForward, run_layer, xavier_uniform_matrices_
from .structures import FeatureLevel

__all__ = ["ENCODER_REGISTRY", "DeformableTransformerEncoder", "TransformerEncoder", "build_encoder"]

ENCODER_REGISTRY = Registry("ENCODER")
ENCODER_REGISTRY.__doc__ = """
Registry of encoders, chosen by ``cfg.MODEL.SAMDETR.ENCODER.NAME``.

A registered class is called as ``Encoder(cfg)``. The module it makes is called with a list of :class:`FeatureLevel`, in
the order of ``MODEL.SAMDETR.IN_FEATURES``, and returns as many levels in the same order, with new ``features`` of the
same shape. An unpadded pixel must not depend on padded ones.
"""


def build_encoder(cfg) -> nn.Module:
    """Build the encoder by ``cfg.MODEL.SAMDETR.ENCODER.NAME``."""
    return ENCODER_REGISTRY.get(cfg.MODEL.SAMDETR.ENCODER.NAME)(cfg)


def flatten_levels(maps: list[Tensor], batch: int) -> Tensor:
    """Concatenate (batch or 1, H_i, W_i, ...) maps to (batch, N, ...)."""
    return torch.cat([x.flatten(1, 2).expand(batch, *[-1] * (x.dim() - 2)) for x in maps], dim=1)


def flatten_all(levels: list[FeatureLevel]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Concatenate what the levels hold.

    Returns:
        Features (B, N, C), position encodings (B, N, C), or (1, N, C) if nothing is padded, and the padding mask (B, N),
        None if nothing is padded.
    """
    batch = levels[0].features.shape[0]
    memory = flatten_levels([level.features for level in levels], batch)
    if all(level.padding_mask is None for level in levels):
        return memory, flatten_levels([level.position for level in levels], 1), None
    masks = [
        memory.new_zeros(batch, *level.size, dtype=torch.bool) if level.padding_mask is None else level.padding_mask
        for level in levels
    ]
    return memory, flatten_levels([level.position for level in levels], batch), flatten_levels(masks, batch)


def with_new_features(levels: list[FeatureLevel], memory: Tensor) -> list[FeatureLevel]:
    """Cut (B, N, C) back into levels that keep everything but their features."""
    parts = memory.split([level.size[0] * level.size[1] for level in levels], dim=1)
    return [
        FeatureLevel(part.unflatten(1, level.size), level.position, level.valid_size, level.padding_mask)
        for part, level in zip(parts, levels)
    ]


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each followed by residual and LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)
        xavier_uniform_matrices_(self.self_attention)

    def forward(self, x: Tensor, position: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Map (B, N, C) to (B, N, C); ``position`` (B or 1, N, C) is added to queries and keys."""
        q = x + position
        attended, _ = self.self_attention(q, q, x, key_padding_mask=padding_mask, need_weights=False)
        return self.feedforward(self.norm(x + attended))


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
            recompute: whether each layer's activations are computed again in the backward pass instead of kept.
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
        """See :data:`ENCODER_REGISTRY`."""
        memory, position, mask = flatten_all(levels)
        for layer in self.layers:
            memory = run_layer(layer, memory, position, mask, recompute=self.recompute)
        return with_new_features(levels, memory)


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


def in_padded_maps(points: Tensor, levels: list[FeatureLevel]) -> Tensor:
    """Map points (..., 2) with the images first, in [0, 1] of the valid image, to (..., V, 2) in [0, 1] of each level's map."""
    ratios = []
    for level in levels:
        height, width = level.size
        ratios.append(level.valid_size / torch.tensor([width, height], dtype=torch.float32, device=points.device))
    ratios = torch.stack(ratios, dim=1)[(slice(None), *[None] * (points.dim() - 2))]  # (B, 1, ..., V, 2)
    return points[..., None, :] * ratios


def encoder_reference_points(levels: list[FeatureLevel]) -> Tensor:
    """Where each pixel looks in each level: its own place in the valid image, in units of the level's padded map.

    Returns:
        (B, N, 1, V, 2) float32 for V levels, the same for all heads.
    """
    places = []
    for level in levels:
        height, width = level.size
        valid_size = level.valid_size[:, None, None]  # (B, 1, 1, 2)
        y, x = torch.meshgrid(
            torch.arange(height, dtype=torch.float32, device=valid_size.device) + 0.5,
            torch.arange(width, dtype=torch.float32, device=valid_size.device) + 0.5,
            indexing="ij",
        )
        places.append((torch.stack([x, y], dim=-1) / valid_size).flatten(1, 2))
    return in_padded_maps(torch.cat(places, dim=1)[:, :, None], levels)


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
            num_levels: number of feature levels.
            num_points: points of each head in each level.
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
        """See :data:`ENCODER_REGISTRY`."""
        memory, position, mask = flatten_all(levels)
        reference_points = encoder_reference_points(levels)
        sizes = [level.size for level in levels]
        for layer in self.layers:
            memory = run_layer(layer, memory, position, reference_points, sizes, mask, recompute=self.recompute)
        return with_new_features(levels, memory)
