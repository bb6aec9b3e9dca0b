"""samdetr.modeling.cross_attention against loops over every head and query."""

import math

import pytest
import torch

from helpers import make_level, make_query
from oracles import plain_attention
from samdetr.modeling.cross_attention import CrossAttention, SMCACrossAttention


@pytest.mark.parametrize("smca", [False, True])
def test_equals_the_loops(smca):
    options = {"dim": 16, "num_heads": 4}
    module = SMCACrossAttention(**options, gaussian_beta=8.0) if smca else CrossAttention(**options)
    level = make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    query = make_query()
    expected = plain_attention(module, query, [level], 0, beta=8.0 if smca else None)
    assert torch.allclose(module(query, [level], 0), expected, atol=1e-5)


def test_padding_is_invisible():
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    features = torch.randn(1, 4, 5, 16)
    query = make_query(batch=1)
    padded = module(query, [make_level(features, [[2, 3]])], 0)
    alone = module(query, [make_level(features[:, :2, :3], [[2, 3]])], 0)
    assert torch.allclose(padded, alone, atol=1e-5)


def test_gaussians_pull_the_keypoint_along():
    """The keypoint's gradient is the Gaussian's."""
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    level = make_level(torch.randn(1, 4, 5, 16), [[4, 5]])
    query = make_query(batch=1)
    query.keypoints.requires_grad_()
    x, y = module.log_gaussian(query, level)
    assert x.shape == (1, 4, 3, 5) and y.shape == (1, 4, 3, 4)
    (gradient,) = torch.autograd.grad(x.sum(), query.keypoints)
    centre = query.keypoints[..., 0] * 5
    pixel = torch.arange(5) + 0.5
    slope = 2 * query.gaussian_scales[..., 0, None] ** 2 * (pixel - centre[..., None]) / 8
    assert torch.allclose(gradient[..., 0], 5 * slope.sum(-1), atol=1e-5)
    assert not gradient[..., 1].any()


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match=r"num_heads \(5\) does not divide dim \(16\)"):
        CrossAttention(dim=16, num_heads=5)


def test_initial_state():
    module = CrossAttention(dim=16, num_heads=4)
    assert not module.output.bias.any()
    assert module.query_content.bias.abs().max() > 0
    assert 0.5 < module.value.weight.abs().max() / math.sqrt(6 / 32) <= 1


def test_weights_are_the_attentions():
    """They add up to one over the unpadded pixels, and the values averaged by them are the output."""
    module = SMCACrossAttention(dim=16, num_heads=4, gaussian_beta=8.0)
    level, query = make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]]), make_query()
    weights = module.attention_weights(query, level)
    assert weights.shape == (2, 4, 3, 20) and torch.allclose(weights.sum(-1), torch.ones(2, 4, 3))
    assert not weights.masked_select(level.padding_mask.flatten(1)[:, None, None]).any()
    value = module.value(level.features).flatten(1, 2).unflatten(-1, (4, 4))
    rebuilt = module.output(torch.einsum("bmqn,bnmd->bqmd", weights, value).flatten(2))
    assert torch.allclose(rebuilt, module(query, [level], 0), atol=1e-6)
