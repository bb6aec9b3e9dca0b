"""samdetr.modeling.baselines.sparse_rcnn against loops over proposals, and torchvision's RoIAlign."""

import math

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F
from torchvision.ops import box_convert, roi_align

from helpers import load_experiment
from samdetr.errors import UserError
from samdetr.modeling.baselines.sparse_rcnn import (
    DynamicInteraction,
    LearnedProposals,
    SparseRCNN,
    SparseStage,
    SparseStages,
    make_pooler,
)

SIZE = {"dim": 16, "dynamic_dim": 4, "pooled_size": 3}


def make_stage():
    return SparseStage(**SIZE, num_heads=4, feedforward_dim=24, num_classes=5, prior_prob=0.01)


def plain_interaction(module, proposal, pooled):
    """One proposal (C,) and its bins (S * S, C), bin by bin."""
    generated = module.weights(proposal)
    dim, inner = len(proposal), module.dynamic_dim
    first = generated[: dim * inner].view(dim, inner)
    second = generated[dim * inner :].view(inner, dim)
    bins = []
    for cell in pooled:
        hidden = module.norm_inside((cell[:, None] * first).sum(0)).relu()
        bins.append(module.norm((hidden[:, None] * second).sum(0)).relu())
    return module.output_norm(module.output(torch.cat(bins))).relu()


def test_dynamic_interaction_is_a_loop_over_proposals_and_bins():
    module = DynamicInteraction(**SIZE)
    proposals, pooled = torch.randn(5, 16), torch.randn(5, 9, 16)
    expected = torch.stack([plain_interaction(module, *pair) for pair in zip(proposals, pooled)])
    assert torch.allclose(module(proposals, pooled), expected, atol=1e-5)


def test_a_stage_is_the_papers():
    stage = make_stage().eval()
    features, pooled = torch.randn(2, 3, 16), torch.randn(6, 9, 16)
    new, logits, deltas = stage(features, pooled)
    x = stage.self_attention_norm(features + stage.self_attention(features, features, features)[0])
    changes = [plain_interaction(stage.interaction, *pair) for pair in zip(x.flatten(0, 1), pooled)]
    x = stage.feedforward(stage.interaction_norm(x + torch.stack(changes).view(2, 3, 16)))
    assert torch.allclose(new, x, atol=1e-5)
    kinds = [[type(layer) for layer in head[0]] for head in (stage.class_head, stage.box_head)]
    layer = [torch.nn.Linear, torch.nn.LayerNorm, torch.nn.ReLU]
    assert kinds == [layer, layer * 3]
    assert torch.allclose(logits, stage.class_head(x), atol=1e-5)
    assert torch.allclose(deltas, stage.box_head(x), atol=1e-5)
    assert torch.allclose(stage.class_head[-1].bias.sigmoid(), torch.tensor(0.01))


def moved_by(corners, deltas, weights):
    """Move a box (x0, y0, x1, y1) by its deltas, as Faster R-CNN defines them."""
    x0, y0, x1, y1 = corners.unbind(-1)
    dx, dy, dw, dh = (deltas / torch.tensor(weights)).unbind(-1)
    limit = math.log(100000.0 / 16)
    width, height = (x1 - x0) * dw.clamp(max=limit).exp(), (y1 - y0) * dh.clamp(max=limit).exp()
    cx, cy = (x0 + x1) / 2 + dx * (x1 - x0), (y0 + y1) / 2 + dy * (y1 - y0)
    return torch.stack([cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2], dim=-1)


def test_stages_pool_refine_and_pass_on():
    """Two images of different sizes in one padded pyramid of one level, so that torchvision's RoIAlign is the oracle."""
    weights = (2.0, 2.0, 1.0, 1.0)
    stages = [make_stage().eval() for _ in range(2)]
    pooler = make_pooler([ShapeSpec(channels=16, stride=8)], pooled_size=3, sampling_ratio=2)
    decoder = SparseStages(stages=stages, pooler=pooler, box_weights=weights)
    maps, sizes = torch.randn(2, 16, 8, 10), torch.tensor([[64.0, 80.0], [40.0, 56.0]])
    features, boxes = torch.randn(2, 3, 16), torch.rand(3, 4) * 0.3 + 0.3
    scale = sizes.flip(1).repeat(1, 2)[:, None]
    corners = box_convert(boxes, "cxcywh", "xyxy") * scale
    torch.nn.init.constant_(stages[1].box_head[-1].bias, 9.0)  # beyond the limit of a size's change
    found = decoder(features, boxes, ([maps], sizes))
    for index, stage in enumerate(stages):
        pooled = roi_align(maps, list(corners.detach()), 3, 1 / 8, sampling_ratio=2, aligned=True)
        features, logits, deltas = stage(features, pooled.flatten(2).transpose(1, 2))
        corners = moved_by(corners, deltas, weights)
        assert torch.allclose(found.logits[index], logits, atol=1e-4)
        assert torch.allclose(found.boxes[index], box_convert(corners / scale, "xyxy", "cxcywh"), atol=1e-4, rtol=1e-4)


def test_boxes_pass_no_gradient_from_stage_to_stage():
    stages = [make_stage() for _ in range(2)]
    pooler = make_pooler([ShapeSpec(channels=16, stride=8)], pooled_size=3, sampling_ratio=2)
    decoder = SparseStages(stages=stages, pooler=pooler, box_weights=(2.0, 2.0, 1.0, 1.0))
    proposals = LearnedProposals(num_proposals=3, dim=16)
    pyramid = [torch.randn(1, 16, 8, 10)], torch.tensor([[64.0, 80.0]])
    predictions = decoder(proposals.features[None], proposals.boxes, pyramid)
    first = torch.autograd.grad(predictions.boxes[0].sum(), proposals.boxes, retain_graph=True)
    second = torch.autograd.grad(predictions.boxes[1].sum(), proposals.boxes, retain_graph=True)
    assert first[0].any() and not second[0].any()
    (gradient,) = torch.autograd.grad(predictions.boxes[1].sum(), proposals.features)
    assert gradient.any()


def test_proposals_start_as_the_whole_image():
    proposals = LearnedProposals(num_proposals=3, dim=16)
    assert F.mse_loss(proposals.boxes, torch.tensor([[0.5, 0.5, 1, 1]]).expand(3, 4)) == 0


def test_the_pyramid_must_have_the_models_width():
    options = ["MODEL.FPN.OUT_CHANNELS", 64]
    with pytest.raises(UserError, match=r"HIDDEN_DIM is 96, but the features have \[64\] channels"):
        SparseRCNN(load_experiment("sparse_rcnn", *options))
