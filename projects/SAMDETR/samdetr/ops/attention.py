"""Attention to all pixels of a map, with keys that heads may share and an optional separable bias.

Shapes: B images, M heads, Q queries, H x W a feature map, N = H * W pixels, D channels (of values: E); J key heads, dividing M.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import accumulate_product_, blocks, empty_to_accumulate, place
from .runtime import is_tracing, to_autocast_dtype, triton_runs_on

__all__ = ["attend", "attend_plain", "attention_weights", "mask_as_bias"]


def mask_as_bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what hides keys when it is added to the logits: minus infinity where ``hidden`` (...), bool, is True, else 0."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -math.inf)


def attention_weights(
    q: Tensor,
    k: Tensor,
    padding_mask: Tensor | None = None,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
) -> Tensor:
    """Return the softmax over all pixels of q . k + bias.

    Args:
        q: (B, M, Q, D), already scaled.
        k: (B, J, N, D): one key per head (J = M), one for all heads (J = 1), or one per group of M / J heads.
        padding_mask: (B, H, W) bool, True at pixels that get no weight; None if there are none.
        bias_x: (B, M, Q, W) float32, added to the logits along x; or None.
        bias_y: (B, M, Q, H) float32, added to the logits along y; None if ``bias_x`` is None.

    Returns:
        (B, M, Q, N) float32, zero at padded pixels.
    """
    logits = (_by_key_head(q, k) @ k.transpose(2, 3)).float().view(*q.shape[:3], k.shape[2])
    # These operations may work in place, because the backward pass does not need the values before them.
    if bias_x is not None:
        by_pixel = logits.unflatten(-1, (bias_y.shape[-1], bias_x.shape[-1]))
        by_pixel.add_(bias_x[..., None, :]).add_(bias_y[..., :, None])
    if padding_mask is not None:
        logits.masked_fill_(padding_mask.flatten(1)[:, None, None], -math.inf)
    return logits.softmax(-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None = None,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
    kernels: str = "torch",
) -> Tensor:
    """Average the values, weighted by :func:`attention_weights`.

    The weights of all queries never exist at once: they are computed block by block, and again in the backward pass.

    Args:
        q, k, padding_mask, bias_x, bias_y: see :func:`attention_weights`.
        v: (B, M, N, E).
        kernels: "torch", or "triton" where that runs.

    Returns:
        (B, M, Q, E), in the dtype of ``v``; in mixed precision in autocast's, whatever dtypes q, k and v have.
    """
    q, k, v = (to_autocast_dtype(x) for x in (q, k, v))  # as torch's own products do
    if is_tracing():
        function = attend_plain
    elif kernels == "triton" and triton_runs_on(q.device.type):
        from .triton_attention import attend_triton as function
    else:
        function = _Attend.apply
    return function(q, k, v, padding_mask, bias_x, bias_y)


def attend_plain(q: Tensor, k: Tensor, v: Tensor, padding_mask=None, bias_x=None, bias_y=None) -> Tensor:
    """Compute :func:`attend` at once, with the weights of all queries."""
    return attention_weights(q, k, padding_mask, bias_x, bias_y).to(v.dtype) @ v


def _by_key_head(x: Tensor, k: Tensor) -> Tensor:
    """Reshape (B, M, Q, ...) to (B, J, M / J * Q, ...): the queries that share a key head become one matrix."""
    return x.flatten(1, 2).unflatten(1, (k.shape[1], -1))


class _Attend(torch.autograd.Function):
    """:func:`attend`, block by block over images and queries."""

    @staticmethod
    def split(q, k, padding_mask, bias_x, bias_y) -> Iterator[tuple]:
        """Yield the index of each block, and the arguments of :func:`attention_weights` for it."""
        batch, heads, queries, _ = q.shape
        for images, some in blocks(batch, queries, heads * k.shape[2], q.device):
            mask = None if padding_mask is None else padding_mask[images]
            bias = [None if part is None else part[images, :, some] for part in (bias_x, bias_y)]
            yield (images, slice(None), some), (q[images, :, some], k[images], mask, *bias)

    @staticmethod
    def forward(ctx, q, k, v, padding_mask, bias_x, bias_y):
        output = v.new_empty(*q.shape[:3], v.shape[-1])
        for block, (block_q, block_k, *rest) in _Attend.split(q, k, padding_mask, bias_x, bias_y):
            output = place(output, block, attend_plain(block_q, block_k, v[block[0]], *rest))
        ctx.save_for_backward(q, k, v, padding_mask, bias_x, bias_y, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        q, k, v, padding_mask, bias_x, bias_y, output = ctx.saved_tensors
        grad_v, grad_k = empty_to_accumulate(v), empty_to_accumulate(k)
        grad_q = torch.empty_like(q)
        grad_x, grad_y = (None if part is None else torch.empty_like(part) for part in (bias_x, bias_y))
        # The softmax's backward pass needs sum(weight * gradient of the weight), which equals sum(output * gradient).
        shares = (gradient.float() * output.float()).sum(-1, keepdim=True)
        for block, arguments in _Attend.split(q, k, padding_mask, bias_x, bias_y):
            images, first = block[0], block[2].start == 0
            weights, g = attention_weights(*arguments), gradient[block]
            accumulate_product_(
                grad_v[images].flatten(0, 1), weights.to(g.dtype).transpose(2, 3).flatten(0, 1), g.flatten(0, 1), first
            )
            grad_logits = (g @ v[images].transpose(2, 3)).float().sub_(shares[block]).mul_(weights)
            if bias_x is not None:
                by_pixel = grad_logits.unflatten(-1, (bias_y.shape[-1], bias_x.shape[-1]))
                grad_x = place(grad_x, block, by_pixel.sum(-2))
                grad_y = place(grad_y, block, by_pixel.sum(-1))
            grad_logits, block_q = _by_key_head(grad_logits.to(q.dtype), k), arguments[0]
            grad_q = place(grad_q, block, (grad_logits @ k[images]).view(block_q.shape))
            grad_logits, block_q = (x.flatten(0, 1) for x in (grad_logits, _by_key_head(block_q, k)))
            grad_k_of_block = grad_k[images].view(-1, *k.shape[2:])  # a view, so that adding in place reaches grad_k
            accumulate_product_(grad_k_of_block, grad_logits.transpose(1, 2), block_q, first)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, grad_x, grad_y
