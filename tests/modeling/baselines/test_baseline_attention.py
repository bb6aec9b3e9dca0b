"""samdetr.modeling.baselines.cross_attention against torch's multi-head attention and plain sampling."""

import math

import pytest
import torch
from torch.nn import functional as F

from helpers import make_input, make_level, make_query, tiny_model
from samdetr.errors import UserError
from samdetr.modeling import cross_attention
from samdetr.modeling.baselines.cross_attention import (
    ConditionalCrossAttention,
    DeformableCrossAttention,
    MultiHeadCrossAttention,
    SMCAMultiHeadCrossAttention,
)
from samdetr.modeling.structures import AlignedQuery
from samdetr.ops.attention import attend, attend_plain
from samdetr.visualization import record_attention

SIZE = {"dim": 16, "num_heads": 4}


def identical_heads(query):
    """What IdentityAligner makes: every head has the same query."""
    content, position, keypoints = (x[:, :, :1].expand_as(x) for x in (query.content, query.position, query.keypoints))
    return AlignedQuery(content, position, keypoints, query.gaussian_scales)


def test_multi_head_attention_is_torchs():
    """DETR's: ``nn.MultiheadAttention(query + query position, memory + position, memory)``."""
    module = MultiHeadCrossAttention(**SIZE)
    torchs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        for i, linear in enumerate((module.query, module.key, module.value)):
            torchs.in_proj_weight[16 * i : 16 * (i + 1)] = linear.weight
            torchs.in_proj_bias[16 * i : 16 * (i + 1)] = linear.bias
    torchs.out_proj.load_state_dict(module.output.state_dict())
    query = identical_heads(make_query())
    level = make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    memory, position = level.features.flatten(1, 2), level.position.flatten(1, 2)
    q = query.content[:, :, 0] + query.position[:, :, 0]
    mask = level.padding_mask.flatten(1)
    expected, weights = torchs(q, memory + position, memory, key_padding_mask=mask, average_attn_weights=False)
    assert torch.allclose(module(query, [level], 0), expected, atol=1e-5)
    assert torch.allclose(module.attention_weights(query, level), weights, atol=1e-5)


def test_gaussians_multiply_the_weights():
    module = SMCAMultiHeadCrossAttention(**SIZE, gaussian_beta=8.0)
    plain = MultiHeadCrossAttention(**SIZE)
    plain.load_state_dict(module.state_dict())
    query, level = make_query(), make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    x, y = module.log_gaussian(query, level)
    gaussian = (x[..., None, :] + y[..., :, None]).exp().flatten(-2)
    expected = plain.attention_weights(query, level) * gaussian
    expected = expected / expected.sum(-1, keepdim=True)
    assert torch.allclose(module.attention_weights(query, level), expected, atol=1e-5)


def test_conditional_attention_adds_products_of_contents_and_of_positions():
    module = ConditionalCrossAttention(**SIZE)
    query = identical_heads(make_query())
    level = make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    content, position = query.content[:, :, 0], query.position[:, :, 0]
    pairs = [
        (module.query_content(content), module.key_content(level.features)),
        (module.query_position(position * module.position_scale(content)), module.key_position(level.position)),
    ]
    logits = sum(torch.einsum("bqmd,bijmd->bmqij", *(x.unflatten(-1, (4, 4)) for x in pair)) for pair in pairs)
    logits = (logits / math.sqrt(8)).masked_fill(level.padding_mask[:, None, None], -math.inf)
    weights = logits.flatten(-2).softmax(-1)
    assert torch.allclose(module.attention_weights(query, level), weights, atol=1e-5)


def test_deformable_attention_samples_every_level_around_the_keypoint():
    module = DeformableCrossAttention(**SIZE, num_levels=2, num_points=1)
    torch.nn.init.zeros_(module.attention.sampling_offsets.bias)  # exactly at the keypoint
    query = make_query(batch=1)
    levels = [make_level(torch.randn(1, *size, 16), [list(size)]) for size in ((6, 8), (3, 4))]
    expected = torch.zeros(1, 3, 4, 4)  # the head's part of the values, the same share from both levels
    for level in levels:
        value = module.attention.value(level.features).permute(0, 3, 1, 2)
        sampled = F.grid_sample(value, 2 * query.keypoints - 1, align_corners=False)  # (1, C, Q, M)
        by_head = sampled.unflatten(1, (4, 4))
        expected += torch.stack([by_head[:, m, :, :, m] for m in range(4)], 2).permute(0, 3, 2, 1) / 2
    assert torch.allclose(module(query, levels, 1), module.attention.output(expected.flatten(2)), atol=1e-5)


def test_deformable_attention_moves_by_pixels_of_the_level():
    module = DeformableCrossAttention(**SIZE, num_levels=1, num_points=1)
    module.attention.sampling_offsets.bias.data = torch.tensor([1.0, 0.0] * 4)  # a pixel to the right
    query = make_query(batch=1)
    query.keypoints = torch.full((1, 3, 4, 2), 0.5)
    features = torch.randn(1, 5, 5, 16)
    found = module(query, [make_level(features, [[5, 5]])], 0)
    right = module.attention.output(module.attention.value(features[0, 2, 3]))
    assert torch.allclose(found, right.expand(1, 3, 16), atol=1e-5)


@pytest.mark.parametrize("kind", ["multi-head", "smca", "conditional", "deformable"])
def test_padding_is_invisible(kind):
    module = {
        "multi-head": lambda: MultiHeadCrossAttention(**SIZE),
        "smca": lambda: SMCAMultiHeadCrossAttention(**SIZE, gaussian_beta=8.0),
        "conditional": lambda: ConditionalCrossAttention(**SIZE),
        "deformable": lambda: DeformableCrossAttention(**SIZE, num_levels=1, num_points=3),
    }[kind]()
    features, query = torch.randn(1, 4, 5, 16), make_query(batch=1)
    padded, alone = make_level(features, [[2, 3]]), make_level(features[:, :2, :3], [[2, 3]])
    assert torch.allclose(module(query, [padded], 0), module(query, [alone], 0), atol=1e-5)


@pytest.mark.parametrize("kind", [MultiHeadCrossAttention, ConditionalCrossAttention])
def test_gradients_are_those_of_the_plain_attention(kind, monkeypatch):
    """Also where keys lie in memory with the heads inside the pixels, and several images make a block."""
    module = kind(**SIZE)
    query, level = make_query(), make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    gradient = torch.randn(2, 3, 16)
    gradients = []
    for function in (attend, attend_plain):
        monkeypatch.setattr(cross_attention, "attend", lambda *args, kernels, function=function: function(*args))
        output = module(query, [level], 0)
        gradients.append(torch.autograd.grad(output, list(module.parameters()), gradient))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))
    assert all(g.any() for (name, _), g in zip(module.named_parameters(), gradients[0]) if name.endswith("weight"))


@pytest.mark.parametrize(
    "name",
    [
        *("MultiHeadCrossAttention", "SMCAMultiHeadCrossAttention"),
        *("ConditionalCrossAttention", "DeformableCrossAttention"),
    ],
)
def test_mixed_precision_trains(name):
    """The backward pass runs outside autocast, as detectron2 and torch want it."""
    model = tiny_model(*("MODEL.SAMDETR.ALIGNER.NAME", "IdentityAligner", "MODEL.SAMDETR.CROSS_ATTENTION.NAME", name))
    inputs = [make_input(64, 64, [(5, 5, 40, 50)], [7])]
    exact = sum(model(inputs).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs)
    total = sum(losses.values())
    assert total.item() == pytest.approx(exact.item(), rel=0.05)
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_to_a_few_points_has_no_picture():
    model = tiny_model("MODEL.SAMDETR.CROSS_ATTENTION.NAME", "DeformableCrossAttention")
    error = pytest.raises(UserError, match="DeformableCrossAttention does not expose its attention weights")
    with error, record_attention(model):
        pass
