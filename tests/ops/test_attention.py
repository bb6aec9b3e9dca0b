"""samdetr.ops.attention: block by block, it gives what the plain attention gives."""

import pytest
import torch

from helpers import make_level
from samdetr.ops.attention import attend, attend_plain
from samdetr.ops.blocks import resized_blocks


@pytest.mark.parametrize("elements", [1, 300, 10**6])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.usefixtures("uninitialised_memory")
def test_blocks_give_what_the_plain_attention_gives(elements, groups, bias, padded, transposed):
    """Query by query, some queries at a time, and several images at a time: outputs and gradients.

    Keys and values may lie in memory with the heads inside the pixels, as splitting channels into heads leaves them.
    """
    shapes = {"v": (3, 2, 20, 4), "q": (3, 2, 7, 8), "k": (3, groups, 20, 8), "x": (3, 2, 7, 5), "y": (3, 2, 7, 4)}
    tensors = {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items() if bias or name in "vqk"}
    mask = make_level(torch.randn(3, 4, 5, 1), [[4, 5], [2, 3], [1, 5]]).padding_mask if padded else None
    v, q, k, x, y = (tensors.get(name) for name in shapes)
    if transposed:
        v, q, k = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (v, q, k))
    expected = attend_plain(q, k, v, mask, x, y)
    with resized_blocks(elements):
        found = attend(q, k, v, mask, x, y)
        gradient = torch.randn_like(found)
        gradients = torch.autograd.grad(found, tuple(tensors.values()), gradient)
    assert torch.allclose(found, expected, atol=1e-6)
    for a, b in zip(gradients, torch.autograd.grad(expected, tuple(tensors.values()), gradient)):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("lower", ["", "q", "k", "v"])
@pytest.mark.parametrize("elements", [1, 10**6])
@pytest.mark.usefixtures("uninitialised_memory")
def test_in_mixed_precision_it_is_computed_in_autocasts_dtype_whatever_it_gets(elements, lower):
    q, k, v = (torch.randn(2, 2, n, 8, requires_grad=True) for n in (7, 20, 20))
    expected = attend_plain(q, k, v)
    gradient = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), gradient)
    with resized_blocks(elements), torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(*(x.bfloat16() if name in lower else x for name, x in zip("qkv", (q, k, v))))
        assert found.dtype == torch.bfloat16 and torch.allclose(found.float(), expected, atol=0.05)
        for a, b in zip(torch.autograd.grad(found, (q, k, v), gradient.bfloat16()), gradients):
            assert a.dtype == torch.float32 and torch.allclose(a, b, atol=0.1)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_no_queries_at_all(key_heads):
    q, k, v = torch.zeros(2, 2, 0, 8), torch.randn(2, key_heads, 20, 8), torch.randn(2, 2, 20, 4, requires_grad=True)
    attended = attend(q, k, v)
    assert attended.shape == (2, 2, 0, 4)
    attended.sum().backward()
    assert not v.grad.any()
