"""Convolution followed by a frozen norm, with the norm's scale folded into the weights."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .runtime import is_tracing, to_autocast_dtype

__all__ = ["folded_conv2d", "folded_conv2d_plain"]


def folded_conv2d(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride, padding, dilation, groups) -> Tensor:
    """Compute ``conv2d(x, weight) * scale + shift`` by scaling the weights instead of every pixel.

    The scaled weights are not kept for the backward pass, which scales them again.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in / groups, kernel height, kernel width).
        scale, shift: (C_out,); no gradient flows into ``scale``.
        stride, padding, dilation, groups: of :func:`torch.nn.functional.conv2d`; the first three as pairs.

    Returns:
        (B, C_out, H', W'), under autocast in the lower precision.
    """
    if is_tracing():
        return folded_conv2d_plain(x, weight, scale, shift, stride, padding, dilation, groups)
    return _FoldedConv2d.apply(to_autocast_dtype(x), weight, scale, shift, stride, padding, dilation, groups)


def folded_conv2d_plain(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, *arguments) -> Tensor:
    """Compute :func:`folded_conv2d` by ordinary operations."""
    return F.conv2d(x, weight * scale.view(-1, 1, 1, 1), shift, *arguments)


class _FoldedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, shift, *arguments):
        ctx.save_for_backward(x, weight, scale)
        ctx.arguments = arguments
        scaled = (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
        return F.conv2d(x, scaled, shift.to(x.dtype), *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        scale = scale.view(-1, 1, 1, 1)
        needs_x, needs_weight, _, needs_shift, *_ = ctx.needs_input_grad
        scaled = (weight * scale).to(x.dtype)
        grad_x, grad_weight, grad_shift = torch.ops.aten.convolution_backward(
            *(gradient, x, scaled, [len(weight)], stride, padding, dilation, False, [0, 0], groups),
            [needs_x, needs_weight, needs_shift],
        )
        if needs_weight:
            grad_weight = grad_weight.to(weight.dtype) * scale
        if needs_shift:
            grad_shift = grad_shift.to(weight.dtype)
        return grad_x, grad_weight, None, grad_shift, None, None, None, None
