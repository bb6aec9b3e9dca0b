"""samdetr.modeling.backbone: DC5 by torchvision's rule, the small ResNet, folded norms."""

import copy

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_backbone

from helpers import load_config, tiny_config
from samdetr.checkpoint import convert_published_state_dict
from samdetr.modeling.backbone import FoldedConv2d, optimize_backbone


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


def test_a_norm_that_is_replaced_is_not_folded():
    module = optimize_backbone(Conv2d(6, 8, 3, stride=2, padding=1, bias=False, norm=FrozenBatchNorm2d(8)))
    assert isinstance(module, FoldedConv2d)
    module.norm = torch.nn.BatchNorm2d(8)
    output = module(torch.randn(4, 6, 9, 7))
    assert module.norm.num_batches_tracked == 1 and output.shape == (4, 8, 5, 4)


def test_kept_scales_follow_the_norms_buffers():
    """Whatever changes them but `.data`, and whatever mode the scales were made in."""
    module = optimize_backbone(Conv2d(6, 8, 3, bias=True, norm=FrozenBatchNorm2d(8)))
    x = torch.randn(2, 6, 9, 7)

    def check(module, x):
        plain = Conv2d.forward(module, x)
        assert torch.allclose(module(x), plain, atol=1e-5)
        assert torch.allclose(module(x), plain, atol=1e-5)  # by the kept ones
        return plain

    with torch.inference_mode():
        first = check(module, x)
    assert torch.equal(module(x), module(x)) and module(x).requires_grad
    module(x).sum().backward()
    other = {name: torch.rand_like(value) + 0.5 for name, value in module.state_dict().items()}
    module.load_state_dict(other)
    second = check(module, x)
    assert not torch.allclose(first, second)
    module.load_state_dict({name: torch.rand_like(value) + 0.5 for name, value in other.items()}, assign=True)
    assert not torch.allclose(check(module, x), second)
    module.norm.running_var.mul_(4)
    check(module, x)
    copied = copy.deepcopy(module)
    copied.norm.weight.mul_(3)
    assert not torch.allclose(check(copied, x), check(module, x))
    assert check(module.double(), x.double()).dtype == torch.float64


def test_a_copy_does_not_keep_the_scales():
    """Even if its buffers have changed as often as the original's had."""
    module = optimize_backbone(Conv2d(6, 8, 3, norm=FrozenBatchNorm2d(8)))
    x, weights = torch.randn(2, 6, 9, 7), module.state_dict()
    for _ in range(3):
        module.load_state_dict({name: value.clone() for name, value in weights.items()})
    module(x)
    copied = copy.deepcopy(module)
    other = {name: torch.rand_like(value) + 0.5 for name, value in weights.items()}
    while copied.norm.weight._version < module.norm.weight._version:
        copied.load_state_dict(other)
    assert torch.equal(copied.norm.weight, other["norm.weight"])
    assert torch.allclose(copied(x), Conv2d.forward(copied, x), atol=1e-5)


def test_a_model_that_was_made_in_inference_mode_runs_outside_of_it():
    with torch.inference_mode():
        module = optimize_backbone(Conv2d(6, 8, 3, norm=FrozenBatchNorm2d(8)))
    x = torch.randn(2, 6, 9, 7)
    with torch.no_grad():
        assert torch.allclose(module(x), Conv2d.forward(module, x), atol=1e-5)


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
