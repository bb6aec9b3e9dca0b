"""samdetr.modeling.deformable_attention: initial state and padding."""

import math

import torch

from samdetr.modeling.deformable_attention import (
    MultiScaleDeformableAttention,
)


def test_initial_state():
    """Points start on rays, one direction per head, the p-th point p pixels out, with uniform attention."""
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
