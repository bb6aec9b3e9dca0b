"""The Triton kernels behind :func:`samdetr.ops.attention.attend`.

Each program treats a tile of queries of one head (backward, for keys and values: a tile of pixels of one key head) and walks
over the pixels (queries), so that weights exist tile by tile only. The Gaussian's two parts are added to the logits on the way;
their gradients are added atomically, so that the last bits depend on the order. Softmax and sums are in float32.

Shapes: see ``attention.py``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .runtime import products_are_exact

__all__ = ["attend_triton"]

_TILE = 32  # queries or pixels
_LAUNCH = {"num_warps": 8, "num_stages": 1}  # keys of 256 channels leave no room for a second stage on older cards


@triton.jit
def _tile(base, row, row_mask, column, width):
    """Load rows of a matrix that is ``width`` wide, zero beyond its edges: (rows, columns)."""
    mask = row_mask[:, None] & (column < width)[None, :]
    return tl.load(base + row.to(tl.int64)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def _logits(
    q,
    k,
    padding,
    bias_x,
    bias_y,
    image,
    head_row,
    pixel,
    row_mask,
    N,
    W,
    H,
    HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return the logits of a tile of queries, (T, D), and of pixels, (T, D): (T, T), minus infinity at padded pixels."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    visible = pixel < N
    if HAS_PADDING:
        visible = visible & (tl.load(padding + image * N + pixel, mask=visible, other=1) == 0)
    if HAS_BIAS:
        mask = row_mask[:, None] & (pixel < N)[None, :]
        row = head_row.to(tl.int64)[:, None]
        logits += tl.load(bias_x + row * W + (pixel % W)[None, :], mask=mask, other=0.0)
        logits += tl.load(bias_y + row * H + (pixel // W)[None, :], mask=mask, other=0.0)
    return tl.where(visible[None, :], logits, -float("inf"))


@triton.jit
def _forward(
    q,
    k,
    v,
    padding,
    bias_x,
    bias_y,
    output,
    log_sums,
    Q,
    N,
    W,
    H,
    M: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)  # of all images
    image = head // M
    key_head = image * J + (head % M) // (M // J)
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    query_mask = query < Q
    key_channel, channel = tl.arange(0, KEY_CHANNELS), tl.arange(0, CHANNELS)
    q_tile = _tile(q + head * Q * D, query, query_mask, key_channel, D)
    most = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    result = tl.zeros((TILE, CHANNELS), tl.float32)
    for first in range(0, N, TILE):
        pixel = first + tl.arange(0, TILE)
        k_tile = _tile(k + key_head * N * D, pixel, pixel < N, key_channel, D)
        v_tile = _tile(v + head * N * E, pixel, pixel < N, channel, E)
        logits = _logits(
            q_tile, k_tile, padding, bias_x, bias_y, image, head * Q + query, pixel, query_mask, N, W, H,
            HAS_PADDING, HAS_BIAS, PRECISION,
        )  # fmt: skip
        new = tl.maximum(most, tl.max(logits, 1))
        base = tl.where(new == -float("inf"), 0.0, new)  # nothing is visible yet
        weights = tl.exp(logits - base[:, None])
        shrink = tl.exp(most - base)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        most = new
    place = output + (head * Q + query)[:, None] * E + channel[None, :]
    result = (result / total[:, None]).to(output.dtype.element_ty)
    tl.store(place, result, mask=query_mask[:, None] & (channel < E)[None, :])
    tl.store(log_sums + head * Q + query, most + tl.log(total), mask=query_mask)


@triton.jit
def _backward_queries(
    q,
    k,
    v,
    padding,
    bias_x,
    bias_y,
    gradient,
    log_sums,
    shares,
    grad_q,
    grad_x,
    grad_y,
    Q,
    N,
    W,
    H,
    M: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    image = head // M
    key_head = image * J + (head % M) // (M // J)
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    query_mask = query < Q
    key_channel, channel = tl.arange(0, KEY_CHANNELS), tl.arange(0, CHANNELS)
    q_tile = _tile(q + head * Q * D, query, query_mask, key_channel, D)
    g_tile = _tile(gradient + head * Q * E, query, query_mask, channel, E)
    row = head * Q + query
    log_sum = tl.load(log_sums + row, mask=query_mask, other=0.0)
    share = tl.load(shares + row, mask=query_mask, other=0.0)
    result = tl.zeros((TILE, KEY_CHANNELS), tl.float32)
    for first in range(0, N, TILE):
        pixel = first + tl.arange(0, TILE)
        k_tile = _tile(k + key_head * N * D, pixel, pixel < N, key_channel, D)
        v_tile = _tile(v + head * N * E, pixel, pixel < N, channel, E)
        logits = _logits(
            q_tile, k_tile, padding, bias_x, bias_y, image, row, pixel, query_mask, N, W, H,
            HAS_PADDING, HAS_BIAS, PRECISION,
        )  # fmt: skip
        weights = tl.exp(logits - log_sum[:, None])
        to_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        to_logits = weights * (to_weights - share[:, None])
        result += tl.dot(to_logits.to(k_tile.dtype), k_tile, input_precision=PRECISION)
        if HAS_BIAS:
            mask = query_mask[:, None] & (pixel < N)[None, :]
            tl.atomic_add(grad_x + row[:, None] * W + (pixel % W)[None, :], to_logits, mask=mask)
            tl.atomic_add(grad_y + row[:, None] * H + (pixel // W)[None, :], to_logits, mask=mask)
    place = grad_q + row[:, None] * D + key_channel[None, :]
    result = result.to(grad_q.dtype.element_ty)
    tl.store(place, result, mask=query_mask[:, None] & (key_channel < D)[None, :])


@triton.jit
def _backward_pixels(
    q,
    k,
    v,
    padding,
    bias_x,
    bias_y,
    gradient,
    log_sums,
    shares,
    grad_k,
    grad_v,
    Q,
    N,
    W,
    H,
    M: tl.constexpr,
    J: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEY_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    key_head = tl.program_id(1).to(tl.int64)
    image = key_head // J
    pixel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    pixel_mask = pixel < N
    key_channel, channel = tl.arange(0, KEY_CHANNELS), tl.arange(0, CHANNELS)
    k_tile = _tile(k + key_head * N * D, pixel, pixel_mask, key_channel, D)
    to_k = tl.zeros((TILE, KEY_CHANNELS), tl.float32)
    for i in range(M // J):
        head = image * M + (key_head % J) * (M // J) + i
        v_tile = _tile(v + head * N * E, pixel, pixel_mask, channel, E)
        to_v = tl.zeros((TILE, CHANNELS), tl.float32)
        for first in range(0, Q, TILE):
            query = first + tl.arange(0, TILE)
            query_mask = query < Q
            row = head * Q + query
            q_tile = _tile(q + head * Q * D, query, query_mask, key_channel, D)
            g_tile = _tile(gradient + head * Q * E, query, query_mask, channel, E)
            log_sum = tl.load(log_sums + row, mask=query_mask, other=0.0)
            share = tl.load(shares + row, mask=query_mask, other=0.0)
            logits = _logits(
                q_tile, k_tile, padding, bias_x, bias_y, image, row, pixel, query_mask, N, W, H,
                HAS_PADDING, HAS_BIAS, PRECISION,
            )  # fmt: skip
            weights = tl.where(query_mask[:, None], tl.exp(logits - log_sum[:, None]), 0.0)
            to_v += tl.dot(tl.trans(weights).to(g_tile.dtype), g_tile, input_precision=PRECISION)
            to_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
            to_logits = weights * (to_weights - share[:, None])
            to_k += tl.dot(tl.trans(to_logits).to(q_tile.dtype), q_tile, input_precision=PRECISION)
        place = grad_v + (head * N + pixel)[:, None] * E + channel[None, :]
        tl.store(place, to_v.to(grad_v.dtype.element_ty), mask=pixel_mask[:, None] & (channel < E)[None, :])
    place = grad_k + (key_head * N + pixel)[:, None] * D + key_channel[None, :]
    tl.store(place, to_k.to(grad_k.dtype.element_ty), mask=pixel_mask[:, None] & (key_channel < D)[None, :])


def _channels(number: int) -> int:
    """Return the width of a tile that holds so many channels; matrix products need 16 at least."""
    return max(16, triton.next_power_of_2(number))


class _AttendTriton(torch.autograd.Function):
    @staticmethod
    def options(q, k, v, padding_mask, bias_x, bias_y) -> tuple[list[int], dict]:
        pixels = k.shape[2]
        width = 1 if bias_x is None else bias_x.shape[-1]
        exact = q.dtype == torch.float32 and products_are_exact()
        return [q.shape[2], pixels, width, pixels // width], {
            "M": q.shape[1],
            "J": k.shape[1],
            "D": q.shape[3],
            "E": v.shape[3],
            "KEY_CHANNELS": _channels(q.shape[3]),
            "CHANNELS": _channels(v.shape[3]),
            "TILE": _TILE,
            "HAS_PADDING": padding_mask is not None,
            "HAS_BIAS": bias_x is not None,
            "PRECISION": "ieee" if exact else "tf32",
        }

    @staticmethod
    def forward(ctx, q, k, v, padding_mask, bias_x, bias_y):
        q, k, v = (x.contiguous() for x in (q, k, v))
        padding = q if padding_mask is None else padding_mask.flatten(1).to(torch.uint8).contiguous()
        bias = [q if part is None else part.contiguous() for part in (bias_x, bias_y)]  # what is not read is any tensor
        sizes, options = _AttendTriton.options(q, k, v, padding_mask, bias_x, bias_y)
        output = v.new_empty(*q.shape[:3], v.shape[-1])
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        grid = triton.cdiv(q.shape[2], _TILE), q.shape[0] * q.shape[1]
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _forward[grid](q, k, v, padding, *bias, output, log_sums, *sizes, **options, **_LAUNCH)
        ctx.save_for_backward(q, k, v, padding, *bias, output, log_sums)
        ctx.sizes, ctx.options = sizes, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        *inputs, output, log_sums = ctx.saved_tensors
        q, k, v, _, bias_x, bias_y = inputs
        gradient = gradient.contiguous()
        shares = (gradient.float() * output.float()).sum(-1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        has_bias = ctx.options["HAS_BIAS"]
        grad_x, grad_y = (torch.zeros_like(part) if has_bias else q for part in (bias_x, bias_y))
        rest = gradient, log_sums, shares
        with torch.cuda.device_of(q):
            grid = triton.cdiv(q.shape[2], _TILE), q.shape[0] * q.shape[1]
            _backward_queries[grid](*inputs, *rest, grad_q, grad_x, grad_y, *ctx.sizes, **ctx.options, **_LAUNCH)
            grid = triton.cdiv(k.shape[2], _TILE), k.shape[0] * k.shape[1]
            _backward_pixels[grid](*inputs, *rest, grad_k, grad_v, *ctx.sizes, **ctx.options, **_LAUNCH)
        return grad_q, grad_k, grad_v, None, *((grad_x, grad_y) if has_bias else (None, None))


def attend_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None = None,
    bias_x: Tensor | None = None,
    bias_y: Tensor | None = None,
) -> Tensor:
    """Attend as :func:`samdetr.ops.attention.attend`, without a matrix of weights."""
    return _AttendTriton.apply(q, k, v, padding_mask, bias_x, bias_y)
