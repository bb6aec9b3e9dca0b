"""Cross-attention between aligned queries and the encoded image (paper sections 3.2 and 4.5.1).

Every head has a query of the full width C, made by the aligner. All heads share one key of width C; values are split into
M parts of C / M channels, as usual. The cross-attentions of other detectors are in ``modeling/baselines/``.

Shapes: B images, Q queries, C model width, M heads, H x W the feature map, N = H * W.
"""

import math

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..ops.attention import attend, attention_weights
from ..ops.runtime import run_layer
from .layers import MLP, xavier_uniform_matrices_
from .structures import AlignedQuery, FeatureLevel

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "CrossAttention",
    "DotProductAttention",
    "SMCACrossAttention",
    "build_cross_attention",
]

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Registry of the decoder's cross-attentions, chosen by ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME``.

A registered class is called as ``Attention(cfg)``, once for each decoder layer. The resulting module is called with

* ``query``, an :class:`AlignedQuery`,
* ``levels``, the list of all :class:`FeatureLevel`, from the finest to the coarsest,
* ``index``, the position in ``levels`` of the level that the layer's aligner looked at,

and returns (B, Q, C), which is added to the query contents. It must leave out padded pixels. A module with an attribute
``needs_scales`` that is True gets ``gaussian_scales`` from the aligner.
"""


def build_cross_attention(cfg) -> nn.Module:
    """Build the cross-attention of one decoder layer that ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME`` names."""
    return CROSS_ATTENTION_REGISTRY.get(cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME)(cfg)


class DotProductAttention(nn.Module):
    """Attention to every pixel of the layer's level, optionally with a Gaussian around each head's keypoint.

    Derived classes say how queries and keys are made, in :meth:`add_projections` and :meth:`query_and_key`.
    """

    @configurable
    def __init__(self, *, dim: int, num_heads: int, gaussian_beta: float | None = None):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
            gaussian_beta: divisor of the Gaussian's squared, scaled distances, in squared pixels of the feature map; None
                for attention without a Gaussian.
        """
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads ({num_heads}) does not divide dim ({dim}).")
        self.dim = dim
        self.num_heads = num_heads
        self.gaussian_beta = gaussian_beta
        self.kernels = "torch"  # set by the meta-architecture
        self.add_projections()
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        xavier_uniform_matrices_(self)
        nn.init.zeros_(self.output.bias)

    @classmethod
    def from_config(cls, cfg):
        return {"dim": cfg.MODEL.SAMDETR.HIDDEN_DIM, "num_heads": cfg.MODEL.SAMDETR.NUM_HEADS}

    @property
    def needs_scales(self) -> bool:
        """Whether the aligner has to predict Gaussian scales."""
        return self.gaussian_beta is not None

    def add_projections(self) -> None:
        """Add the layers that :meth:`query_and_key` uses."""
        raise NotImplementedError

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        """Return ``q``, scaled, and ``k`` as :func:`samdetr.ops.attention.attention_weights` takes them."""
        raise NotImplementedError

    def forward(self, query: AlignedQuery, levels: list[FeatureLevel], index: int) -> Tensor:
        """Attend to one level; see :data:`CROSS_ATTENTION_REGISTRY`."""
        level = levels[index]
        v = self.split_heads(self.value(level.features))
        q, k, padding_mask, bias_x, bias_y = self.logit_terms(query, level)
        attended = attend(q, k, v, padding_mask, bias_x, bias_y, kernels=self.kernels)
        return self.output(attended.transpose(1, 2).flatten(2))

    def attention_weights(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """Return the attention weight of every pixel, by head and query: (B, M, Q, N) float32, zero at padded pixels."""
        return attention_weights(*self.logit_terms(query, level))

    def logit_terms(self, query: AlignedQuery, level: FeatureLevel) -> tuple:
        """Return the arguments of :func:`attention_weights`."""
        return *self.query_and_key(query, level), level.padding_mask, *self.log_gaussian(query, level)

    def log_gaussian(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor | None, Tensor | None]:
        """Return the logarithm of each head's Gaussian as two summands.

        Returns:
            (B, M, Q, W) along x and (B, M, Q, H) along y, float32; or (None, None) without a Gaussian.
        """
        if self.gaussian_beta is None:
            return None, None
        height, width = level.size
        centres = level.in_pixels(query.keypoints).unbind(-1)
        scales = query.gaussian_scales.unbind(-1)  # type: ignore[union-attr] # there, since needs_scales is True
        parts = []
        for length, centre, scale in zip((width, height), centres, scales):
            pixel = torch.arange(length, dtype=torch.float32, device=centre.device) + 0.5
            distance = scale[..., None] * (pixel - centre[..., None])
            parts.append((distance.square() / -self.gaussian_beta).transpose(1, 2))
        return parts[0], parts[1]

    def split_heads(self, x: Tensor) -> Tensor:
        """Reshape (B, H, W, C) to (B, M, N, C / M)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


@CROSS_ATTENTION_REGISTRY.register()
class CrossAttention(DotProductAttention):
    """Attention with a query of full width for each head and one key for all heads, as published."""

    def add_projections(self) -> None:
        self.query_content = nn.Linear(self.dim, self.dim)
        self.query_position = MLP([self.dim] * 3)
        self.key_content = nn.Linear(self.dim, self.dim)
        self.key_position = MLP([self.dim] * 3)

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        # Cheaper to recompute than to keep, since each head has a query of the full width.
        q = run_layer(self.project_query, query.content, query.position, recompute=True, random=False).transpose(1, 2)
        k = (self.key_content(level.features) + self.key_position(level.position)).flatten(1, 2)
        return q, k[:, None]

    def project_query(self, content: Tensor, position: Tensor) -> Tensor:
        """Project content and position queries, (B, Q, M, C) each, add them up and scale them."""
        q = self.query_content(content) + self.query_position(position)
        return q / math.sqrt(self.dim)  # the root of the full width C, not of C / M, as published


@CROSS_ATTENTION_REGISTRY.register()
class SMCACrossAttention(CrossAttention):
    """SMCA, spatially modulated co-attention: :class:`CrossAttention` with its Gaussian."""

    @configurable
    def __init__(self, *, dim: int, num_heads: int, gaussian_beta: float):
        """See :class:`DotProductAttention`."""
        super().__init__(dim=dim, num_heads=num_heads, gaussian_beta=gaussian_beta)

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "gaussian_beta": cfg.MODEL.SAMDETR.CROSS_ATTENTION.GAUSSIAN_BETA}
