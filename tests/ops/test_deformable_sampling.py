"""samdetr.ops.deformable_sampling against loops over every query, head, level and point."""

import pytest
import torch

from oracles import bilinear
from samdetr.ops.blocks import resized_blocks
from samdetr.ops.deformable_sampling import (
    deformable_sampling,
    deformable_sampling_plain,
)
from samdetr.ops.runtime import run_layer


@pytest.mark.parametrize("sample", [deformable_sampling, deformable_sampling_plain])
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
def test_sparse_product_is_the_plain_sampling(elements):
    """Outputs and gradients, block by block, with positions far outside the maps."""
    sizes = [(5, 7), (3, 4), (1, 1)]
    value = torch.randn(2, 35 + 12 + 1, 3, 6, dtype=torch.float64, requires_grad=True)
    locations = torch.randn(2, 9, 3, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 9, 3, 3, 2, dtype=torch.float64, requires_grad=True)
    arguments = (value, locations, weights)
    expected = deformable_sampling_plain(value, sizes, locations, weights)
    gradient = torch.randn_like(expected)
    with resized_blocks(elements):
        found = deformable_sampling(value, sizes, locations, weights)
        gradients = torch.autograd.grad(found, arguments, gradient)
    assert torch.allclose(found, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, arguments, gradient)):
        assert torch.allclose(a, b)


def test_positions_that_are_not_finite_give_values_that_are_not():
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5)
    locations[..., 0] = float("nan")
    sampled = deformable_sampling(torch.ones(1, 4, 1, 2), [(2, 2)], locations, torch.ones(1, 1, 1, 1, 1))
    assert sampled.isnan().all()


def test_positions_keep_float32_in_mixed_precision():
    """On a map of 167 columns, bfloat16 positions would be wrong by up to 0.16 pixels."""
    value = torch.linspace(0, 1, 167).expand(4, -1).reshape(1, -1, 1, 1)
    locations = torch.rand(1, 50, 1, 1, 1, 2) * 0.8 + 0.1
    weights = torch.ones(1, 50, 1, 1, 1)
    exact = deformable_sampling(value, [(4, 167)], locations, weights)
    half = deformable_sampling(value.bfloat16(), [(4, 167)], locations, weights)
    rounding = deformable_sampling(value.bfloat16().float(), [(4, 167)], locations, weights)
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
    assert torch.autograd.gradcheck(lambda v, x, w: deformable_sampling(v, sizes, x, w), arguments)


def test_no_queries_at_all():
    value = torch.randn(1, 6, 2, 3, requires_grad=True)
    sampled = deformable_sampling(value, [(2, 3)], torch.zeros(1, 0, 2, 1, 2, 2), torch.zeros(1, 0, 2, 1, 2))
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
        return run_layer(deformable_sampling_plain, value, sizes, locations, weights, recompute=True)

    arguments = (value, locations, weights)
    found = run_layer(recomputed, *arguments, recompute=nested)
    expected = deformable_sampling_plain(value, sizes, locations, weights)
    assert torch.equal(found, expected)
    gradient = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(result, arguments, gradient) for result in (found, expected))):
        assert torch.equal(a, b)
