"""Triton's kernels, in Triton's interpreter where there is no GPU, against their plain twins: outputs and gradients."""

import logging

import pytest
import torch

from helpers import DN, SMCA, TWO_LEVELS, make_input, tiny_model
from samdetr.ops.attention import attend, attend_plain
from samdetr.ops.deformable_sampling import deformable_sampling, deformable_sampling_plain
from samdetr.ops.runtime import triton_runs_on

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def compare(found, expected, inputs, atol=5e-5):
    """Compare outputs, and gradients for a random one."""
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=atol)
    gradient = torch.randn_like(found)
    gradients = zip(torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(expected, inputs, gradient))
    for a, b in gradients:
        assert torch.allclose(a, b, atol=atol * max(1, b.abs().max().item()))


def leaf(*shape, scale=1.0, shift=0.0):
    return (torch.randn(*shape, device=DEVICE) * scale + shift).requires_grad_()


@pytest.mark.parametrize(
    ("batch", "queries", "heads", "dim", "sizes", "points"),
    [
        (2, 5, 2, 5, [(4, 6), (2, 3)], 3),
        (1, 1, 1, 1, [(1, 1)], 1),
        (1, 37, 1, 8, [(5, 7), (3, 4), (1, 1)], 3),  # no multiple of the rows of a program
        (2, 3, 8, 32, [(3, 3)], 2),
    ],
)
def test_sampling(batch, queries, heads, dim, sizes, points):
    pixels = sum(height * width for height, width in sizes)
    value = leaf(batch, pixels, heads, dim)
    locations = leaf(batch, queries, heads, len(sizes), points, 2, scale=0.5, shift=0.5)  # some outside the maps
    weights = leaf(batch, queries, heads, len(sizes), points)
    inputs = value, locations, weights
    found = deformable_sampling(value, sizes, locations, weights, "triton")
    compare(found, deformable_sampling_plain(value, sizes, locations, weights), inputs)


def test_positions_that_are_not_finite_give_values_that_are_not():
    locations = torch.full((1, 1, 1, 1, 1, 2), 0.5, device=DEVICE)
    locations[..., 0] = float("nan")
    value, weights = torch.ones(1, 4, 1, 2, device=DEVICE), torch.ones(1, 1, 1, 1, 1, device=DEVICE)
    assert deformable_sampling(value, [(2, 2)], locations, weights, "triton").isnan().all()


@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "queries", "size", "key_dim", "dim"),
    [
        (2, 4, 1, 5, (4, 6), 8, 5),  # one key for all heads, as in SAM-DETR
        (1, 4, 2, 40, (7, 6), 20, 8),
        (1, 2, 2, 1, (5, 5), 16, 16),  # one query
        (1, 8, 1, 33, (5, 9), 64, 8),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_padding", [True, False])
def test_attention(batch, heads, key_heads, queries, size, key_dim, dim, with_bias, with_padding):
    height, width = size
    q, k = leaf(batch, heads, queries, key_dim), leaf(batch, key_heads, height * width, key_dim)
    v = leaf(batch, heads, height * width, dim)
    bias = [leaf(batch, heads, queries, side) if with_bias else None for side in (width, height)]
    mask = None
    if with_padding:
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=DEVICE)
        mask[-1, 3:] = mask[-1, :, 4:] = True
    inputs = [x for x in (q, k, v, *bias) if x is not None]
    compare(attend(q, k, v, mask, *bias, kernels="triton"), attend_plain(q, k, v, mask, *bias), inputs)


def test_a_first_tile_that_is_all_padding():
    q, k, v = leaf(1, 1, 3, 4), leaf(1, 1, 40, 4), leaf(1, 1, 40, 4)
    mask = torch.zeros(1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[..., :35] = True
    compare(attend(q, k, v, mask, kernels="triton"), attend_plain(q, k, v, mask), [q, k, v])


@pytest.mark.slow
def test_eight_hundred_queries():
    q, k, v = leaf(1, 1, 800, 8), leaf(1, 1, 63, 8), leaf(1, 1, 63, 4)
    bias = leaf(1, 1, 800, 9), leaf(1, 1, 800, 7)
    compare(attend(q, k, v, None, *bias, kernels="triton"), attend_plain(q, k, v, None, *bias), [q, k, v, *bias])


@pytest.mark.slow
def test_a_model_trains_with_them_as_without():
    options = [*SMCA, *DN, *TWO_LEVELS, "MODEL.DEVICE", DEVICE]
    inputs = [make_input(40, 56, [(5, 5, 40, 35)], [3]), make_input(32, 64, [(9, 5, 50, 25)], [1])]
    results = {}
    for kernels in ("torch", "triton"):
        torch.manual_seed(3)
        model = tiny_model(*options, "MODEL.SAMDETR.KERNELS", kernels)
        assert {part.kernels for part in model.modules() if hasattr(part, "kernels")} == {kernels}
        torch.manual_seed(4)
        losses = model(inputs)
        sum(losses.values()).backward()
        results[kernels] = losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, loss in results["torch"][0].items():
        assert torch.allclose(loss, results["triton"][0][name], rtol=1e-4, atol=1e-5), name
    for name, gradient in results["torch"][1].items():
        other = results["triton"][1][name]
        assert torch.allclose(gradient, other, atol=1e-4 * max(1, gradient.abs().max().item())), name


def test_where_they_cannot_run_torchs_are_used_with_a_word(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton_runs_on.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 6, 4), torch.randn(1, 2, 6, 4)
            for _ in range(2):
                assert torch.equal(attend(q, k, v, kernels="triton"), attend(q, k, v))
        assert caplog.text.count("Triton's kernels were asked for, but these need CUDA, and the model runs on cpu") == 1
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        triton_runs_on.cache_clear()
        assert not triton_runs_on("cuda")
        assert "the package triton is missing (pip install triton): torch's are used" in caplog.text
    finally:
        triton_runs_on.cache_clear()
