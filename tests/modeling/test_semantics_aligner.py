"""samdetr.modeling.semantics_aligner against torchvision's RoIAlign and torch's grid_sample."""

import pytest
import torch

from helpers import make_aligner, make_level
from oracles import plain_align
from samdetr.modeling.position_encoding import sine_embedding
from samdetr.modeling.semantics_aligner import IdentityAligner, SemanticsAligner


@pytest.mark.parametrize(("predict_scales", "pooled_content"), [(False, False), (True, False), (True, True)])
def test_equals_the_plain_formulation(predict_scales, pooled_content):
    aligner = make_aligner(predict_scales, pooled_content=pooled_content)
    if pooled_content:
        assert not aligner.pooled_content.weight.any() and not aligner.pooled_content.bias.any()
        torch.nn.init.normal_(aligner.pooled_content.weight)
    level = make_level(torch.randn(2, 6, 8, 16), [[6, 8], [4, 5]])
    content = torch.randn(2, 3, 16)
    boxes = torch.cat([torch.rand(2, 3, 2), torch.rand(2, 3, 2) * 0.9 + 0.05], -1)
    aligned = aligner(content, boxes, level)
    contents, positions, keypoints, scales, residual = plain_align(aligner, content, boxes, level)
    assert torch.allclose(aligned.content, contents, atol=1e-5)
    assert torch.allclose(aligned.position, positions, atol=1e-5)
    assert torch.allclose(aligned.keypoints, keypoints, atol=1e-6)
    if predict_scales:
        assert torch.allclose(aligned.gaussian_scales, scales, atol=1e-5)
    else:
        assert aligned.gaussian_scales is None
    if pooled_content:
        assert aligned.residual.any() and torch.allclose(aligned.residual, residual, atol=1e-5)
    else:
        assert aligned.residual is None


def test_where_gradients_flow():
    """Keypoints learn through the sampling and the Gaussian's centre; boxes only through the latter."""
    aligner = make_aligner(True)
    features = torch.randn(1, 6, 8, 16)
    boxes = torch.tensor([[[0.4, 0.5, 0.3, 0.4]]], requires_grad=True)
    aligned = aligner(torch.randn(1, 1, 16), boxes, make_level(features, [[6, 8]]))
    last = aligner.keypoint_head.layers[-1].weight

    def reaches(output, target):
        return torch.autograd.grad(output.sum(), target, retain_graph=True, allow_unused=True)[0] is not None

    assert reaches(aligned.content, last) and not reaches(aligned.content, boxes)
    assert not reaches(aligned.position, last) and not reaches(aligned.position, boxes)
    assert reaches(aligned.keypoints, last) and reaches(aligned.keypoints, boxes)
    assert reaches(aligned.gaussian_scales, last) and not reaches(aligned.gaussian_scales, boxes)


def test_initial_state():
    aligner = make_aligner(True)
    assert not aligner.keypoint_head.layers[-1].bias.any()
    for layer in [aligner.reduction, *aligner.keypoint_head.layers, aligner.content_gate, aligner.position_gate]:
        bound = (6 / sum(layer.weight.shape)) ** 0.5
        assert 0.7 * bound < layer.weight.abs().max() <= bound
    assert aligner.content_gate.bias.abs().max() > 0


def test_identity_aligner_hands_the_query_on():
    aligner = IdentityAligner(dim=16, num_heads=4, temperature=10000.0, predict_scales=True)
    content, boxes = torch.randn(1, 3, 16), torch.rand(1, 3, 4)
    aligned = aligner(content, boxes, None)
    for head in range(4):
        assert torch.equal(aligned.content[:, :, head], content)
        assert torch.equal(aligned.position[:, :, head], sine_embedding(boxes[..., :2], 16, 10000.0))
        assert torch.equal(aligned.keypoints[:, :, head], boxes[..., :2])
    assert aligned.gaussian_scales.shape == (1, 3, 4, 2)


def test_reduction_that_does_not_divide_the_width():
    with pytest.raises(ValueError, match=r"reduction \(4\) does not divide dim \(18\)"):
        make_aligner(False, dim=18)


def test_mixed_precision_takes_float32_features():
    """CUDA's LayerNorm gives float32 under autocast; pooling and sampling are in the lower precision all the same."""
    aligner = make_aligner(True)
    level = make_level(torch.randn(1, 6, 8, 16), [[6, 8]])
    level.features.requires_grad_()
    content, boxes = torch.randn(1, 3, 16), torch.rand(1, 3, 4) * 0.5 + 0.2
    exact = aligner(content, boxes, level)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned = aligner(content, boxes, level)
    assert aligned.content.dtype == aligned.position.dtype == torch.bfloat16
    assert aligned.keypoints.dtype == aligned.gaussian_scales.dtype == torch.float32
    assert torch.allclose(aligned.content.float(), exact.content, atol=0.1)
    aligned.content.sum().backward()
    assert level.features.grad.dtype == torch.float32 and level.features.grad.any()


def test_keypoints_can_be_shared_by_heads():
    aligner = SemanticsAligner(
        dim=8, num_heads=4, pooled_size=3, reduction=2, hidden_dims=[6], temperature=10000.0, num_keypoints=2,
        predict_scales=True,
    )  # fmt: skip
    torch.nn.init.normal_(aligner.keypoint_head.layers[-1].weight)
    level = make_level(torch.randn(1, 4, 5, 8), [[4, 5]])
    aligned = aligner(torch.randn(1, 3, 8), torch.rand(1, 3, 4), level)
    assert aligner.keypoint_head.layers[-1].out_features == 2 * 4  # two keypoints with two scales each
    for field in (aligned.keypoints, aligned.gaussian_scales):
        assert field.shape == (1, 3, 4, 2)
        assert torch.equal(field[:, :, 0], field[:, :, 1]) and torch.equal(field[:, :, 2], field[:, :, 3])
        assert not torch.equal(field[:, :, 1], field[:, :, 2])
    assert not torch.equal(aligned.content[:, :, 0], aligned.content[:, :, 1])  # weighted for each head by itself


def test_keypoints_that_do_not_divide_the_heads():
    with pytest.raises(ValueError, match=r"num_keypoints \(3\) does not divide num_heads \(4\)"):
        SemanticsAligner(
            dim=8, num_heads=4, pooled_size=3, reduction=2, hidden_dims=[6], temperature=1e4, num_keypoints=3
        )
