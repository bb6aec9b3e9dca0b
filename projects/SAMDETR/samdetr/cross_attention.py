"""Cross-attention between aligned queries and one level of the encoded image (paper sections 3.2 and 4.5.1).

Every head has a query of the full width C, made by the aligner, and all heads share one key of width C; values are
split into M parts of C / M as usual.

Shapes: B images, Q queries, C model width, M heads, H x W the feature map, N = H * W.
"""

import math

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .errors import UserError
from .layers import MLP, xavier_uniform_matrices_
from .structures import AlignedQuery, FeatureLevel

__all__ = ["CROSS_ATTENTION_REGISTRY", "CrossAttention", "SMCACrossAttention", "build_cross_attention"]

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Registry of the decoder's cross-attentions, chosen by ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME``.

A registered class is called as ``Attention(cfg)``, once for each decoder layer. The module it makes is called with an
:class:`AlignedQuery` and a :class:`FeatureLevel`, must leave out the level's padded pixels, and returns (B, Q, C): what
is added to the query contents. If the class has an attribute ``needs_scales = True``, the aligner is asked for
``gaussian_scales``.
"""


def build_cross_attention(cfg) -> nn.Module:
    """Build the cross-attention of one decoder layer by ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME``."""
    return CROSS_ATTENTION_REGISTRY.get(cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME)(cfg)


@CROSS_ATTENTION_REGISTRY.register()
class CrossAttention(nn.Module):
    """Multi-head attention with a query for each head and one key for all."""

    needs_scales = False

    @configurable
    def __init__(self, *, dim: int, num_heads: int):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
        """
        super().__init__()
        if dim % num_heads:
            raise UserError(f"MODEL.SAMDETR.NUM_HEADS ({num_heads}) does not divide MODEL.SAMDETR.HIDDEN_DIM ({dim}).")
        self.dim = dim
        self.num_heads = num_heads
        self.query_content = nn.Linear(dim, dim)
        self.query_position = MLP([dim, dim, dim])
        self.key_content = nn.Linear(dim, dim)
        self.key_position = MLP([dim, dim, dim])
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        xavier_uniform_matrices_(self)
        nn.init.zeros_(self.output.bias)

    @classmethod
    def from_config(cls, cfg):
        return {"dim": cfg.MODEL.SAMDETR.HIDDEN_DIM, "num_heads": cfg.MODEL.SAMDETR.NUM_HEADS}

    def forward(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """See :data:`CROSS_ATTENTION_REGISTRY`."""
        weights = self.attention_logits(query, level).softmax(-1)  # (B, M, Q, N)
        value = self.value(level.features).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.output((weights.to(value.dtype) @ value).transpose(1, 2).flatten(2))

    def attention_logits(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """(B, M, Q, N) float32 logits of the attention, -inf at padded pixels."""
        q = self.query_content(query.content) + self.query_position(query.position)
        q = q.transpose(1, 2).flatten(1, 2)  # (B, M Q, C)
        k = (self.key_content(level.features) + self.key_position(level.position)).flatten(1, 2)
        logits = (q / math.sqrt(self.dim)) @ k.transpose(1, 2)  # the full width's root, as published
        logits = logits.float().unflatten(1, (self.num_heads, -1))
        if level.padding_mask is not None:
            logits = logits.masked_fill(level.padding_mask.flatten(1)[:, None, None], -math.inf)
        return logits


@CROSS_ATTENTION_REGISTRY.register()
class SMCACrossAttention(CrossAttention):
    """Spatially modulated co-attention: a Gaussian around each head's keypoint, added to its logits as a logarithm."""

    needs_scales = True

    @configurable
    def __init__(self, *, dim: int, num_heads: int, gaussian_beta: float):
        """
        Args:
            dim, num_heads: see :class:`CrossAttention`.
            gaussian_beta: divisor of the squared, scaled distances, in squared pixels of the feature map.
        """
        super().__init__(dim=dim, num_heads=num_heads)
        self.gaussian_beta = gaussian_beta

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "gaussian_beta": cfg.MODEL.SAMDETR.CROSS_ATTENTION.GAUSSIAN_BETA}

    def attention_logits(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """(B, M, Q, N) float32 logits of the attention, -inf at padded pixels."""
        x, y = self.log_gaussian(query, level)
        logits = super().attention_logits(query, level).unflatten(-1, level.size)
        return (logits + x[..., None, :] + y[..., :, None]).flatten(-2)

    def log_gaussian(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        """The Gaussian's logarithm, as two parts whose sum it is: (B, M, Q, W) along x and (B, M, Q, H) along y."""
        height, width = level.size
        centre = query.keypoints.float() * level.valid_size[:, None, None]  # in pixels of the feature map
        parts = []
        for axis, length in enumerate((width, height)):
            pixel = torch.arange(length, dtype=torch.float32, device=centre.device) + 0.5
            distance = query.gaussian_scales[..., axis, None] * (pixel - centre[..., axis, None])
            parts.append((-distance.square() / self.gaussian_beta).transpose(1, 2))
        return parts[0], parts[1]
