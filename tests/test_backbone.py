"""samdetr.backbone: DC5 by torchvision's rule, and the small ResNet."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import load_config, tiny_config
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from samdetr.backbone import FoldedConv2d, optimize_backbone
from samdetr.checkpoint import convert_published_state_dict


def test_dc5_is_torchvisions():
    """Same weights, same features as torchvision's ResNet-50 with a dilated last stage."""
    reference = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    backbone = build_backbone(load_config("sam_detr_R_50_DC5_1x")).eval()
    published = {
        f"backbone.0.body.{name}": value
        for name, value in reference.state_dict().items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
    converted = convert_published_state_dict(published)
    backbone.load_state_dict({name.removeprefix("backbone."): value for name, value in converted.items()})
    assert any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules())
    x = torch.randn(1, 3, 64, 96)
    body = torchvision.models._utils.IntermediateLayerGetter(reference, {"layer4": "res5"})
    with torch.no_grad():
        found, expected = backbone(x)["res5"], body(x)["res5"]
    assert found.shape == (1, 2048, 4, 6) and backbone.output_shape()["res5"].stride == 16
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_dc5_needs_the_dilation():
    with pytest.raises(ValueError, match="RES5_DILATION is 1"):
        build_backbone(load_config("sam_detr_R_50_DC5_1x", "MODEL.RESNETS.RES5_DILATION", 1))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_scaled_weights_are_kept(monkeypatch, dtype):
    """Between the forward and the backward pass they do not exist, in mixed precision neither."""
    used = []

    def conv2d(x, weight, *args):
        assert weight.dtype == dtype
        used.append(weakref.ref(weight))
        return F.conv2d(x, weight, *args)

    monkeypatch.setattr("samdetr.backbone.F", SimpleNamespace(conv2d=conv2d))
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


def test_a_norm_that_is_replaced_is_not_folded():
    module = optimize_backbone(frozen_conv())
    module.norm = torch.nn.BatchNorm2d(8)
    output = module(torch.randn(4, 6, 9, 7))
    assert module.norm.num_batches_tracked == 1 and output.shape == (4, 8, 5, 4)


def test_norms_that_learn_are_not_folded():
    backbone = optimize_backbone(build_backbone(tiny_config("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)))
    assert not any(isinstance(module, FoldedConv2d) for module in backbone.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in backbone.modules())


def test_mini_resnet():
    backbone = build_backbone(tiny_config("MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"]))
    features = backbone(torch.randn(1, 3, 64, 96))
    shapes = backbone.output_shape()
    for name, feature in features.items():
        stride = shapes[name].stride
        assert feature.shape == (1, shapes[name].channels, 64 // stride, 96 // stride)
    assert {name: shape.stride for name, shape in shapes.items()} == {"res3": 8, "res5": 32}
