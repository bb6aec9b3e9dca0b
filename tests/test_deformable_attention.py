"""samdetr.deformable_attention against loops over every query, head, level and point."""

import math

import pytest
import torch

from samdetr import layers
from samdetr.deformable_attention import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_sampling,
    sampling_plain,
)


def bilinear(feature, x, y):
    """Sample (H, W, D) at pixel coordinates, zeros outside."""
    height, width = feature.shape[:2]
    value = torch.zeros(feature.shape[-1])
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < height and 0 <= j < width:
                value += (1 - abs(y - i)) * (1 - abs(x - j)) * feature[i, j]
    return value


@pytest.mark.parametrize("sample", [multi_scale_deformable_sampling, sampling_plain])
def test_sampling_equals_the_loops(sample):
    sizes, heads, points, dim, queries = [(4, 6), (2, 3)], 2, 3, 5, 4
    value = torch.randn(2, 4 * 6 + 2 * 3, heads, dim)
    locations = torch.rand(2, queries, heads, len(sizes), points, 2) * 1.4 - 0.2
    weights = torch.rand(2, queries, heads, len(sizes), points)
    result = sample(value, sizes, locations, weights)
    for b in range(2):
        for q in range(queries):
            for m in range(heads):
                expected, start = torch.zeros(dim), 0
                for level, (height, width) in enumerate(sizes):
                    feature = value[b, start : start + height * width, m].view(height, width, dim)
                    start += height * width
                    for p in range(points):
                        x, y = (locations[b, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
                        expected += weights[b, q, m, level, p] * bilinear(feature, x, y)
                assert torch.allclose(result[b, q, m * dim : (m + 1) * dim], expected, atol=1e-4)


@pytest.mark.parametrize("elements", [1, 1000, 10**7])
def test_sparse_product_is_the_plain_sampling(monkeypatch, elements):
    """Outputs and gradients, block by block, with positions far outside the maps."""
    monkeypatch.setitem(layers._BLOCK_ELEMENTS, "cpu", elements)
    sizes = [(5, 7), (3, 4), (1, 1)]
    value = torch.randn(2, 35 + 12 + 1, 3, 6, dtype=torch.float64, requires_grad=True)
    locations = torch.randn(2, 9, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 9, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    arguments = (value, locations, weights)
    found, expected = (f(value, sizes, *arguments[1:]) for f in (multi_scale_deformable_sampling, sampling_plain))
    assert torch.allclose(found, expected)
    gradient = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(result, arguments, gradient) for result in (found, expected))):
        assert torch.allclose(a, b)


def test_positions_that_are_not_finite_give_values_that_are_not():
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    locations[..., 0] = float("nan")
    sampled = multi_scale_deformable_sampling(torch.ones(1, 4, 1, 2), [(2, 2)], locations, torch.ones(1, 1, 1, 1, 1))
    assert sampled.isnan().all()


def test_positions_keep_float32_in_mixed_precision():
    """On a map of 167 columns, bfloat16 positions would be wrong by up to 0.16 pixels."""
    value = torch.linspace(0, 1, 167).expand(4, -1).reshape(1, -1, 1, 1)
    locations = torch.rand(1, 50, 1, 1, 1, 2) * 0.8 + 0.1
    weights = torch.ones(1, 50, 1, 1, 1)
    exact = multi_scale_deformable_sampling(value, [(4, 167)], locations, weights)
    half = multi_scale_deformable_sampling(value.bfloat16(), [(4, 167)], locations, weights)
    rounding = multi_scale_deformable_sampling(value.bfloat16().float(), [(4, 167)], locations, weights)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, rounding.bfloat16())
    assert (exact - rounding).abs().max() < 4e-3


def test_gradients_are_those_of_the_definition():
    """torch.autograd.gradcheck, in double precision, for values, positions and weights."""
    sizes = [(3, 4), (2, 2)]
    value = torch.randn(1, 16, 2, 2, dtype=torch.float64, requires_grad=True)
    locations = (torch.rand(1, 3, 2, 2, 2, 2, dtype=torch.float64) * 0.9 + 0.05).requires_grad_()
    weights = torch.rand(1, 3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    arguments = (value, locations, weights)
    assert torch.autograd.gradcheck(lambda v, x, w: multi_scale_deformable_sampling(v, sizes, x, w), arguments)


def test_initial_state():
    """Points start on rays, one direction a head, the p-th point p pixels out, with uniform attention."""
    attention = MultiScaleDeformableAttention(dim=16, num_heads=8, num_levels=2, num_points=3)
    offsets = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    assert torch.allclose(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    assert torch.allclose(offsets[1, 1], torch.tensor([[1.0, 1], [2, 2], [3, 3]]), atol=1e-5)
    assert torch.allclose(offsets[2, 0], torch.tensor([[0.0, 1], [0, 2], [0, 3]]), atol=1e-5)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any() and not attention.attention_weights.bias.any()
    assert not attention.value.bias.any() and not attention.output.bias.any()
    assert attention.value.weight.abs().max() <= math.sqrt(6 / 32)


def test_padded_values_are_zero():
    attention = MultiScaleDeformableAttention(dim=8, num_heads=2, num_levels=1, num_points=2)
    memory = torch.randn(1, 6, 8)
    mask = torch.tensor([[False, False, True, False, False, True]])
    query, reference = torch.randn(1, 6, 8), torch.rand(1, 6, 1, 1, 2)
    out = attention(query, reference, memory, [(2, 3)], mask)
    memory[0, [2, 5]] = 1e3
    assert torch.equal(attention(query, reference, memory, [(2, 3)], mask), out)


def test_no_queries_at_all():
    value = torch.randn(1, 6, 2, 3, requires_grad=True)
    sampled = multi_scale_deformable_sampling(
        value, [(2, 3)], torch.zeros(1, 0, 2, 1, 2, 2), torch.zeros(1, 0, 2, 1, 2)
    )
    assert sampled.shape == (1, 0, 6)
    sampled.sum().backward()
    assert not value.grad.any()


@pytest.mark.parametrize("nested", [False, True])
def test_recomputed_plain_sampling(nested):
    """What runs on other devices than the CPU, by itself and inside a layer that is computed again, too."""
    sizes = [(4, 6), (2, 3)]
    value = torch.randn(2, 30, 2, 3, requires_grad=True)
    locations = torch.rand(2, 5, 2, 2, 3, 2, requires_grad=True)
    weights = torch.rand(2, 5, 2, 2, 3, requires_grad=True)

    def recomputed(value, locations, weights):
        return layers.run_layer(sampling_plain, value, sizes, locations, weights, recompute=True)

    arguments = (value, locations, weights)
    found = layers.run_layer(recomputed, *arguments, recompute=nested)
    expected = sampling_plain(value, sizes, locations, weights)
    assert torch.equal(found, expected)
    gradient = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(result, arguments, gradient) for result in (found, expected))):
        assert torch.equal(a, b)
