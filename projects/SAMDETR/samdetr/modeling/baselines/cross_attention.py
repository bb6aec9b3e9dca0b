"""The cross-attentions of other detectors, as entries of ``CROSS_ATTENTION_REGISTRY``.

They are meant for unaligned queries (``IdentityAligner``), but take aligned queries as well. docs/baselines.md says what
each takes from which detector; the detectors themselves are in ``transformers_detr``.

Shapes: B images, Q queries, C model width, M heads, V levels, N pixels of a level.
"""

import math

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from ..cross_attention import CROSS_ATTENTION_REGISTRY, DotProductAttention, SMCACrossAttention
from ..deformable_attention import MultiScaleDeformableAttention
from ..layers import MLP
from ..levels import flatten_levels, points_in_padded_maps
from ..structures import AlignedQuery, FeatureLevel

__all__ = [
    "ConditionalCrossAttention",
    "DeformableCrossAttention",
    "MultiHeadCrossAttention",
    "SMCAMultiHeadCrossAttention",
]


def project_by_head(linear: nn.Linear, x: Tensor) -> Tensor:
    """Project (B, Q, M, C), each head to its own C / M outputs of the layer, to (B, M, Q, C / M)."""
    heads = x.shape[2]
    projected = torch.einsum("bqmc,mdc->bmqd", x, linear.weight.unflatten(0, (heads, -1)))
    return projected + linear.bias.view(heads, 1, -1).to(projected.dtype)


@CROSS_ATTENTION_REGISTRY.register()
class MultiHeadCrossAttention(DotProductAttention):
    """DETR's attention: the sum of content and position, projected and split into heads (https://arxiv.org/abs/2005.12872)."""

    def add_projections(self) -> None:
        self.query = nn.Linear(self.dim, self.dim)
        self.key = nn.Linear(self.dim, self.dim)

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        q = project_by_head(self.query, query.content + query.position) / math.sqrt(self.dim / self.num_heads)
        return q, self.split_heads(self.key(level.features + level.position))


@CROSS_ATTENTION_REGISTRY.register()
class SMCAMultiHeadCrossAttention(MultiHeadCrossAttention):
    """DETR's attention with SMCA's Gaussians (https://arxiv.org/abs/2101.07448)."""

    @configurable
    def __init__(self, *, dim: int, num_heads: int, gaussian_beta: float):
        """See :class:`DotProductAttention`."""
        super().__init__(dim=dim, num_heads=num_heads, gaussian_beta=gaussian_beta)

    @classmethod
    def from_config(cls, cfg):
        return SMCACrossAttention.from_config(cfg)


@CROSS_ATTENTION_REGISTRY.register()
class ConditionalCrossAttention(DotProductAttention):
    """Conditional DETR's attention (https://arxiv.org/abs/2108.06152): content and position side by side, so that their
    products add up and do not mix; the position is scaled by a function of the content."""

    def add_projections(self) -> None:
        self.query_content = nn.Linear(self.dim, self.dim)
        self.query_position = nn.Linear(self.dim, self.dim)
        self.position_scale = MLP([self.dim] * 3)
        self.key_content = nn.Linear(self.dim, self.dim)
        self.key_position = nn.Linear(self.dim, self.dim)

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        position = query.position * self.position_scale(query.content)
        q = [project_by_head(self.query_content, query.content), project_by_head(self.query_position, position)]
        k = [self.split_heads(self.key_content(level.features)), self.split_heads(self.key_position(level.position))]
        k[1] = k[1].expand_as(k[0])
        return torch.cat(q, dim=-1) / math.sqrt(2 * self.dim / self.num_heads), torch.cat(k, dim=-1)


@CROSS_ATTENTION_REGISTRY.register()
class DeformableCrossAttention(nn.Module):
    """Deformable DETR's attention (https://arxiv.org/abs/2010.04159): a few points of every level around each head's keypoint.

    With ``IdentityAligner`` the keypoint is the box's centre, as published. Offsets are in pixels of the level, not in units
    of the box, as in Deformable DETR without box refinement. A query that differs by head is averaged over the heads.
    """

    @configurable
    def __init__(self, *, dim: int, num_heads: int, num_levels: int, num_points: int):
        """See :class:`MultiScaleDeformableAttention`."""
        super().__init__()
        self.attention = MultiScaleDeformableAttention(
            dim=dim, num_heads=num_heads, num_levels=num_levels, num_points=num_points
        )

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "dim": node.HIDDEN_DIM,
            "num_heads": node.NUM_HEADS,
            "num_levels": len(node.IN_FEATURES),
            "num_points": node.CROSS_ATTENTION.NUM_POINTS,
        }

    def forward(self, query: AlignedQuery, levels: list[FeatureLevel], index: int) -> Tensor:
        """Attend to all levels; see :data:`CROSS_ATTENTION_REGISTRY`."""
        memory, _, padding_mask = flatten_levels(levels)
        points = points_in_padded_maps(query.keypoints.float(), levels)
        sizes = [level.size for level in levels]
        return self.attention((query.content + query.position).mean(2), points, memory, sizes, padding_mask)
