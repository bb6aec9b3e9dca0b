"""Cross-attention between aligned queries and one level of the encoded image (paper sections 3.2 and 4.5.1).

Every head has a query of the full width C, made by the aligner, and all heads share one key of width C; values are
split into M parts of C / M as usual. Other detectors' cross-attentions are in ``baseline_attention.py``.

Shapes: B images, Q queries, C model width, M heads, H x W the feature map, N = H * W; q and k of width D.
"""

import math

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .errors import UserError
from .layers import MLP, accumulate_product_, blocks, is_tracing, xavier_uniform_matrices_, zeros_to_accumulate
from .structures import AlignedQuery, FeatureLevel

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "CrossAttention",
    "DotProductAttention",
    "GaussianModulation",
    "SMCACrossAttention",
    "build_cross_attention",
]

CROSS_ATTENTION_REGISTRY = Registry("CROSS_ATTENTION")
CROSS_ATTENTION_REGISTRY.__doc__ = """
Registry of the decoder's cross-attentions, chosen by ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME``.

A registered class is called as ``Attention(cfg)``, once for each decoder layer. The module it makes is called with an
:class:`AlignedQuery` and a :class:`FeatureLevel`, must leave out the level's padded pixels, and returns (B, Q, C): what
is added to the query contents. If the class has an attribute ``needs_scales = True``, the aligner is asked for
``gaussian_scales``; if it has ``needs_all_levels = True``, it gets the list of all levels, from the finest to the coarsest,
in place of the one that the layer's aligner looks at.
"""


def build_cross_attention(cfg) -> nn.Module:
    """Build the cross-attention of one decoder layer by ``cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME``."""
    return CROSS_ATTENTION_REGISTRY.get(cfg.MODEL.SAMDETR.CROSS_ATTENTION.NAME)(cfg)


class DotProductAttention(nn.Module):
    """What the attentions to every pixel share; how queries and keys are made is left to the class derived from this."""

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
        self.add_projections()
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        xavier_uniform_matrices_(self)
        nn.init.zeros_(self.output.bias)

    @classmethod
    def from_config(cls, cfg):
        return {"dim": cfg.MODEL.SAMDETR.HIDDEN_DIM, "num_heads": cfg.MODEL.SAMDETR.NUM_HEADS}

    def add_projections(self) -> None:
        """Add the layers that :meth:`query_and_key` needs."""
        raise NotImplementedError

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        """``q``, scaled, and ``k`` of :func:`attention_weights`."""
        raise NotImplementedError

    def logit_bias(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the logits along x, (B, M, Q, W), and along y, (B, M, Q, H), float32; or two None."""
        return None, None

    def forward(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """See :data:`CROSS_ATTENTION_REGISTRY`."""
        attended = attend(self.split_heads(self.value(level.features)), *self.logit_terms(query, level))
        return self.output(attended.transpose(1, 2).flatten(2))

    def attention_weights(self, query: AlignedQuery, level: FeatureLevel) -> Tensor:
        """(B, M, Q, N) float32: how much of each pixel every head of a query takes; zero at padded pixels."""
        return attention_weights(*self.logit_terms(query, level))

    def logit_terms(self, query: AlignedQuery, level: FeatureLevel) -> tuple:
        """The arguments of :func:`attention_weights`."""
        return *self.query_and_key(query, level), level.padding_mask, *self.logit_bias(query, level)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, H, W, C) as (B, M, N, C / M)."""
        return x.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GaussianModulation:
    """SMCA, mixed into a :class:`DotProductAttention`: a Gaussian around each head's keypoint, added to its logits as a
    logarithm."""

    needs_scales = True

    @configurable
    def __init__(self, *, gaussian_beta: float, **arguments):
        """
        Args:
            gaussian_beta: divisor of the squared, scaled distances, in squared pixels of the feature map.
            arguments: of the attention that this is mixed into.
        """
        super().__init__(**arguments)
        self.gaussian_beta = gaussian_beta

    @classmethod
    def from_config(cls, cfg):
        return {**super().from_config(cfg), "gaussian_beta": cfg.MODEL.SAMDETR.CROSS_ATTENTION.GAUSSIAN_BETA}

    def logit_bias(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        """The Gaussian's logarithm, as two parts whose sum it is: (B, M, Q, W) along x and (B, M, Q, H) along y."""
        height, width = level.size
        centre = query.keypoints.float() * level.valid_size[:, None, None]  # in pixels of the feature map
        parts = []
        for axis, length in enumerate((width, height)):
            pixel = torch.arange(length, dtype=torch.float32, device=centre.device) + 0.5
            distance = query.gaussian_scales[..., axis, None] * (pixel - centre[..., axis, None])
            parts.append((-distance.square() / self.gaussian_beta).transpose(1, 2))
        return parts[0], parts[1]


@CROSS_ATTENTION_REGISTRY.register()
class CrossAttention(DotProductAttention):
    """Attention with a query of full width for each head and one key for all, as published."""

    def add_projections(self) -> None:
        self.query_content = nn.Linear(self.dim, self.dim)
        self.query_position = MLP([self.dim] * 3)
        self.key_content = nn.Linear(self.dim, self.dim)
        self.key_position = MLP([self.dim] * 3)

    def query_and_key(self, query: AlignedQuery, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        q = self.query_content(query.content) + self.query_position(query.position)
        q = (q / math.sqrt(self.dim)).transpose(1, 2)  # the full width's root, as published
        k = (self.key_content(level.features) + self.key_position(level.position)).flatten(1, 2)
        return q, k[:, None]


@CROSS_ATTENTION_REGISTRY.register()
class SMCACrossAttention(GaussianModulation, CrossAttention):
    """Spatially modulated co-attention."""


def by_group(x: Tensor, k: Tensor) -> Tensor:
    """(B, M, Q, ...) of each head as (B, G, M / G * Q, ...) of each group of heads that shares one of the keys ``k``."""
    return x.flatten(1, 2).unflatten(1, (k.shape[1], -1))


def attention_weights(
    q: Tensor, k: Tensor, padding_mask: Tensor | None, bias_x: Tensor | None, bias_y: Tensor | None
) -> Tensor:
    """Softmax over the pixels of the queries' product with the keys.

    Args:
        q: (B, M, Q, D), scaled.
        k: (B, G, N, D): a key for each of G groups of heads, one for all (G = 1) or one for each head (G = M).
        padding_mask: (B, H, W) bool, True at pixels that get no weight; or None.
        bias_x: (B, M, Q, W) float32, added to the logits along x; or None.
        bias_y: (B, M, Q, H) float32, added along y; None if ``bias_x`` is.

    Returns:
        (B, M, Q, N) float32.
    """
    logits = (by_group(q, k) @ k.transpose(2, 3)).float().view(*q.shape[:3], -1)
    # In place: neither the product nor these need the old values in the backward pass.
    if bias_x is not None:
        by_pixel = logits.unflatten(-1, (bias_y.shape[-1], bias_x.shape[-1]))
        by_pixel.add_(bias_x[..., None, :]).add_(bias_y[..., :, None])
    if padding_mask is not None:
        logits.masked_fill_(padding_mask.flatten(1)[:, None, None], -math.inf)
    return logits.softmax(-1)


def attend_plain(v: Tensor, q: Tensor, k: Tensor, padding_mask, bias_x, bias_y) -> Tensor:
    """See :func:`attend`."""
    return attention_weights(q, k, padding_mask, bias_x, bias_y).to(v.dtype) @ v


def attend(v: Tensor, q: Tensor, k: Tensor, padding_mask, bias_x, bias_y) -> Tensor:
    """Average the values by :func:`attention_weights`.

    Block by block, so that the weights of all queries never exist at once; the backward pass computes them again.
    ``attend_plain`` is the same in one line.

    Args:
        v: (B, M, N, D).
        q, k, padding_mask, bias_x, bias_y: see :func:`attention_weights`.

    Returns:
        (B, M, Q, D), in the values' dtype.
    """
    function = attend_plain if is_tracing() else _BlockwiseAttention.apply
    return function(v, q, k, padding_mask, bias_x, bias_y)


class _BlockwiseAttention(torch.autograd.Function):
    @staticmethod
    def split(q, k, padding_mask, bias_x, bias_y):
        """(images, queries) of each block, with the arguments of :func:`attention_weights` for it."""
        batch, heads, queries, _ = q.shape
        for images, some in blocks(batch, queries, heads * k.shape[2], q.device):
            mask = None if padding_mask is None else padding_mask[images]
            bias = [None if part is None else part[images, :, some] for part in (bias_x, bias_y)]
            yield (images, slice(None), some), (q[images, :, some], k[images], mask, *bias)

    @staticmethod
    def forward(ctx, v, q, k, padding_mask, bias_x, bias_y):
        output = v.new_empty(*q.shape[:3], v.shape[-1])
        for block, arguments in _BlockwiseAttention.split(q, k, padding_mask, bias_x, bias_y):
            output[block] = attend_plain(v[block[0]], *arguments)
        ctx.save_for_backward(v, q, k, padding_mask, bias_x, bias_y, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        v, q, k, padding_mask, bias_x, bias_y, output = ctx.saved_tensors
        grad_v, grad_k = zeros_to_accumulate(v), zeros_to_accumulate(k)
        grad_q = torch.empty_like(q)
        grad_x, grad_y = (None if part is None else torch.empty_like(part) for part in (bias_x, bias_y))
        # The softmax's backward pass needs the sum of weight times gradient, which is that of output times gradient.
        shares = (gradient.float() * output.float()).sum(-1, keepdim=True)
        for block, arguments in _BlockwiseAttention.split(q, k, padding_mask, bias_x, bias_y):
            images = block[0]
            weights, g = attention_weights(*arguments), gradient[block]
            grad_v[images] += weights.to(g.dtype).transpose(2, 3) @ g
            grad_logits = (g @ v[images].transpose(2, 3)).float().sub_(shares[block]).mul_(weights)
            if bias_x is not None:
                by_pixel = grad_logits.unflatten(-1, (bias_y.shape[-1], bias_x.shape[-1]))
                grad_x[block], grad_y[block] = by_pixel.sum(-2), by_pixel.sum(-1)
            grad_logits, block_q = by_group(grad_logits.to(q.dtype), k), arguments[0]
            grad_q[block] = (grad_logits @ k[images]).view(block_q.shape)
            grad_logits, block_q = (x.flatten(0, 1) for x in (grad_logits, by_group(block_q, k)))
            grad_k_of_block = grad_k[images].view(-1, *k.shape[2:])  # a view, to be added to in place
            accumulate_product_(grad_k_of_block, grad_logits.transpose(1, 2), block_q)
        return grad_v.to(v.dtype), grad_q, grad_k.to(k.dtype), None, grad_x, grad_y
