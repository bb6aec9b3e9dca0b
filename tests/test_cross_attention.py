"""samdetr.cross_attention against loops over every head and query."""

import math

import pytest
import torch
from test_encoder import make_level

from samdetr import layers
from samdetr.cross_attention import CrossAttention, SMCACrossAttention, attend, attend_plain
from samdetr.structures import AlignedQuery


def make_query(batch=2, queries=3, heads=4, dim=16):
    return AlignedQuery(
        content=torch.randn(batch, queries, heads, dim),
        position=torch.randn(batch, queries, heads, dim),
        keypoints=torch.rand(batch, queries, heads, 2),
        gaussian_scales=torch.randn(batch, queries, heads, 2),
    )


def plain_attention(module, query, level, beta=None):
    """Head by head, pixel by pixel."""
    batch, queries, heads, dim = query.content.shape
    result = torch.zeros(batch, queries, dim)
    value = module.value(level.features)
    key = module.key_content(level.features) + module.key_position(level.position)
    for b in range(batch):
        valid_width, valid_height = (int(x) for x in level.valid_size[b])
        for q in range(queries):
            parts = []
            for m in range(heads):
                vector = module.query_content(query.content[b, q, m]) + module.query_position(query.position[b, q, m])
                logits, values = [], []
                for i in range(valid_height):
                    for j in range(valid_width):
                        logit = vector @ key[b, i, j] / math.sqrt(dim)
                        if beta is not None:
                            cx, cy = query.keypoints[b, q, m] * level.valid_size[b]
                            sx, sy = query.gaussian_scales[b, q, m]
                            logit = logit - (sx**2 * (j + 0.5 - cx) ** 2 + sy**2 * (i + 0.5 - cy) ** 2) / beta
                        logits.append(logit)
                        values.append(value[b, i, j].view(heads, -1)[m])
                parts.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            result[b, q] = module.output(torch.cat(parts))
    return result


@pytest.mark.parametrize("smca", [False, True])
def test_equals_the_loops(smca):
    options = {"dim": 16, "num_heads": 4}
    module = SMCACrossAttention(**options, gaussian_beta=8.0) if smca else CrossAttention(**options)
    level = make_level(torch.randn(2, 4, 5, 16), [[5, 4], [3, 2]])
    query = make_query()
    expected = plain_attention(module, query, level, beta=8.0 if smca else None)
    assert torch.allclose(module(query, level), expected, atol=1e-5)


def test_padding_is_invisible():
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    features = torch.randn(1, 4, 5, 16)
    query = make_query(batch=1)
    padded = module(query, make_level(features, [[3, 2]]))
    alone = module(query, make_level(features[:, :2, :3], [[3, 2]]))
    assert torch.allclose(padded, alone, atol=1e-5)


def test_gaussians_pull_the_keypoint_along():
    """The keypoint's gradient is the Gaussian's."""
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    level = make_level(torch.randn(1, 4, 5, 16), [[5, 4]])
    query = make_query(batch=1)
    query.keypoints.requires_grad_()
    x, y = module.logit_bias(query, level)
    assert x.shape == (1, 4, 3, 5) and y.shape == (1, 4, 3, 4)
    (gradient,) = torch.autograd.grad(x.sum(), query.keypoints)
    centre = query.keypoints[..., 0] * 5
    pixel = torch.arange(5) + 0.5
    slope = 2 * query.gaussian_scales[..., 0, None] ** 2 * (pixel - centre[..., None]) / 8
    assert torch.allclose(gradient[..., 0], 5 * slope.sum(-1), atol=1e-5)
    assert not gradient[..., 1].any()


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match=r"NUM_HEADS \(5\) does not divide .*HIDDEN_DIM \(16\)"):
        CrossAttention(dim=16, num_heads=5)


def test_initial_state():
    module = CrossAttention(dim=16, num_heads=4)
    assert not module.output.bias.any()
    assert module.query_content.bias.abs().max() > 0
    assert 0.5 < module.value.weight.abs().max() / math.sqrt(6 / 32) <= 1


@pytest.mark.parametrize("elements", [1, 300, 10**6])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_give_what_the_plain_attention_gives(monkeypatch, elements, groups, bias, padded, transposed):
    """Query by query, some queries at a time, and several images at a time: outputs and gradients.

    Keys and values may lie in memory with the heads inside the pixels, as splitting channels into heads leaves them.
    """
    monkeypatch.setitem(layers._BLOCK_ELEMENTS, "cpu", elements)
    shapes = {"v": (3, 2, 20, 4), "q": (3, 2, 7, 8), "k": (3, groups, 20, 8), "x": (3, 2, 7, 5), "y": (3, 2, 7, 4)}
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items() if bias or name in "vqk"}
    mask = make_level(torch.randn(3, 4, 5, 1), [[5, 4], [3, 2], [5, 1]]).padding_mask if padded else None
    v, q, k, x, y = (tensors.get(name) for name in shapes)
    if transposed:
        v, q, k = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (v, q, k))
    found, expected = (function(v, q, k, mask, x, y) for function in (attend, attend_plain))
    assert torch.allclose(found, expected, atol=1e-6)
    gradient = torch.randn_like(found)
    gradients = [torch.autograd.grad(result, tuple(tensors.values()), gradient) for result in (found, expected)]
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-5)


def test_weights_are_the_attentions():
    """They add up to one over the unpadded pixels, and the values averaged by them are the output."""
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    level, query = make_level(torch.randn(2, 4, 5, 16), [[5, 4], [3, 2]]), make_query()
    weights = module.attention_weights(query, level)
    assert weights.shape == (2, 4, 3, 20) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 3))
    assert not weights.masked_select(level.padding_mask.flatten(1)[:, None, None]).any()
    value = module.value(level.features).flatten(1, 2).unflatten(-1, (4, 4))
    rebuilt = module.output(torch.einsum("bmqn,bnmd->bqmd", weights, value).flatten(2))
    assert torch.allclose(rebuilt, module(query, level), atol=1e-6)
