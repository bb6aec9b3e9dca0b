"""samdetr.ops.folded_conv: the norm's scale in the weights changes nothing but rounding."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d

from samdetr.modeling.backbone import FoldedConv2d, optimize_backbone
from samdetr.ops.folded_conv import folded_conv2d, folded_conv2d_plain


def frozen_conv(bias=False):
    conv = Conv2d(6, 8, 3, stride=2, padding=1, bias=bias, norm=FrozenBatchNorm2d(8), activation=torch.relu)
    for buffer in (conv.norm.weight, conv.norm.bias, conv.norm.running_mean):
        buffer.normal_()
    conv.norm.running_var.uniform_(0.5, 2)
    return conv


@pytest.mark.parametrize("bias", [False, True])
def test_folded_norms_change_nothing_but_rounding(bias):
    """Outputs, gradients and the state dict are those of convolution and norm one after the other."""
    plain = frozen_conv(bias)
    folded = optimize_backbone(copy.deepcopy(plain))
    assert isinstance(folded, FoldedConv2d) and folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in folded.state_dict().items())
    x = torch.randn(2, 6, 9, 7)
    outputs = plain(x), folded(x)
    assert torch.allclose(*outputs, atol=1e-5)
    weight = torch.randn_like(outputs[0])
    gradients = [
        torch.autograd.grad((output * weight).sum(), tuple(module.parameters()))
        for output, module in zip(outputs, (plain, folded))
    ]
    for expected, found in zip(*gradients):
        assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4)


def test_the_twin_computes_the_same():
    x, weight = torch.randn(2, 6, 9, 7, requires_grad=True), torch.randn(8, 6, 3, 3, requires_grad=True)
    scale, shift = torch.randn(8), torch.randn(8, requires_grad=True)
    results = [f(x, weight, scale, shift, (2, 2), (1, 1), (1, 1), 1) for f in (folded_conv2d, folded_conv2d_plain)]
    assert torch.allclose(*results, atol=1e-5)
    gradient = torch.randn_like(results[0])
    for a, b in zip(*(torch.autograd.grad(result, (x, weight, shift), gradient) for result in results)):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scaled_weights_are_kept(monkeypatch, dtype):
    """Between the forward and the backward pass they do not exist, in mixed precision neither."""
    used = []

    def conv2d(x, weight, *args):
        assert weight.dtype == dtype
        used.append(weakref.ref(weight))
        return F.conv2d(x, weight, *args)

    monkeypatch.setattr("samdetr.ops.folded_conv.F", SimpleNamespace(conv2d=conv2d))
    module = optimize_backbone(frozen_conv())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = module(torch.randn(2, 6, 9, 7, requires_grad=True))
    assert output.requires_grad and output.dtype == dtype and len(used) == 1 and used[0]() is None
    output.sum().backward()
    assert module.weight.grad.dtype == torch.float32


def test_a_frozen_weight_gets_no_gradient():
    module = optimize_backbone(frozen_conv())
    module.weight.requires_grad_(False)
    x = torch.randn(2, 6, 9, 7, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None and module.weight.grad is None
