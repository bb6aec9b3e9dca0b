"""samdetr.ops.roi_align against torchvision's op."""

import pytest
import torch
import torch.nn.functional as F

from oracles import torchvision_roi_align
from samdetr.ops.blocks import resized_blocks
from samdetr.ops.roi_align import (
    linear_interpolation_weights,
    roi_align,
    roi_align_weights,
    sample_separably,
    sample_separably_plain,
)


def pool(features, boxes, valid_size, output_size):
    rows, columns = roi_align_weights(boxes, valid_size, features.shape[1:3], output_size)
    return roi_align(features, rows, columns)


def random_boxes(batch, number):
    return torch.cat([torch.rand(batch, number, 2), torch.rand(batch, number, 2) * 0.98 + 0.01], dim=-1)


@pytest.mark.parametrize("output_size", [1, 4, 7])
@pytest.mark.parametrize("size", [(5, 9), (25, 34), (16, 3)])
def test_equals_torchvision_on_the_valid_part(size, output_size):
    height, width = size
    features = torch.randn(2, height, width, 6, dtype=torch.float64, requires_grad=True)
    other = features.detach().clone().requires_grad_()
    valid_size = torch.tensor([[height, width], [max(1, height - 4), max(1, width - 3)]], dtype=torch.float64)
    boxes = random_boxes(2, 40).double()  # many reach over the edge
    pooled = pool(features, boxes, valid_size, output_size)
    expected = torchvision_roi_align(other, boxes, valid_size, output_size)
    assert torch.allclose(pooled, expected, atol=1e-5)
    gradient = torch.randn_like(pooled)
    pooled.backward(gradient)
    expected.backward(gradient)
    assert torch.allclose(features.grad, other.grad, atol=1e-4)


def test_boxes_on_whole_pixels():
    """A box of exactly 2 x 2 pixels and one bin is their mean; of one pixel, that pixel."""
    features = torch.arange(16.0).view(1, 4, 4, 1)
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.125, 0.375, 0.25, 0.25]]])
    pooled = pool(features, boxes, torch.tensor([[4.0, 4.0]]), 1)
    assert torch.allclose(pooled.flatten(), torch.tensor([(5 + 6 + 9 + 10) / 4, 4.0]))


def test_no_boxes_at_all():
    features = torch.randn(2, 5, 9, 6, requires_grad=True)
    pooled = pool(features, torch.zeros(2, 0, 4), torch.tensor([[5.0, 9.0], [4.0, 6.0]]), 7)
    assert pooled.shape == (2, 0, 7, 7, 6)
    pooled.sum().backward()
    assert not features.grad.any()


def test_no_gradient_reaches_the_boxes():
    boxes = random_boxes(1, 3).requires_grad_()
    pooled = pool(torch.randn(1, 4, 4, 2, requires_grad=True), boxes, torch.tensor([[4.0, 4.0]]), 2)
    pooled.sum().backward()
    assert boxes.grad is None


def test_interpolation_weights_and_their_gradient_are_grid_samples():
    length = 7
    values = torch.randn(length)
    # Halfway, at centres, at and beyond both ends.
    position = torch.tensor([0.5, 3.0, 2.25, -0.5, -1.0, -1.5, 6.0, 6.5, 7.0], requires_grad=True)
    other = position.detach().clone().requires_grad_()
    sampled = linear_interpolation_weights(position, length) @ values
    grid = torch.stack([(2 * other + 1) / length - 1, torch.zeros_like(other)], dim=-1)[None, None]
    expected = F.grid_sample(values.view(1, 1, 1, -1), grid, align_corners=False).flatten()
    assert torch.allclose(sampled, expected, atol=1e-5)
    sampled.sum().backward()
    expected.sum().backward()
    inside = (other > -1) & (other < 7)
    # Exactly at a pixel's centre, float rounding decides on which side grid_sample's derivative is taken.
    between = other.detach() != other.detach().round()
    assert torch.allclose(position.grad[inside & between], other.grad[inside & between], atol=1e-4)


@pytest.mark.parametrize("elements", [1, 40, 10**6])
@pytest.mark.usefixtures("uninitialised_memory")
def test_samples_block_by_block_are_those_at_once(elements):
    """Row by row, some rows at a time, and several images at a time: the plain formulation's results and gradients."""
    features = torch.randn(3, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    rows, columns = (torch.randn(3, 7, n, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    arguments = (features, rows, columns)
    expected = sample_separably_plain(*arguments)
    gradient = torch.randn_like(expected)
    with resized_blocks(elements):
        found = sample_separably(*arguments)
        gradients = torch.autograd.grad(found, arguments, gradient)
    assert torch.allclose(found, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, arguments, gradient)):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("elements", [1, 10**6])
def test_in_mixed_precision_samples_are_of_the_features_type(elements):
    features = torch.randn(2, 4, 5, 6, requires_grad=True)
    rows, columns = torch.rand(2, 7, 4, requires_grad=True), torch.rand(2, 7, 5, requires_grad=True)
    with resized_blocks(elements), torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample_separably(features, rows, columns)
        gradients = torch.autograd.grad(found.sum(), (features, rows, columns))
    assert all(tensor.dtype == torch.float32 for tensor in (found, *gradients))
    assert torch.allclose(found, sample_separably_plain(features, rows, columns), atol=0.1)


@pytest.mark.usefixtures("uninitialised_memory")
def test_no_samples_at_all():
    features = torch.randn(2, 4, 5, 6, requires_grad=True)
    sampled = sample_separably(features, torch.zeros(2, 0, 4), torch.zeros(2, 0, 5))
    assert sampled.shape == (2, 0, 6)
    sampled.sum().backward()
    assert not features.grad.any()


def test_gradients_of_low_precision_are_added_up_in_float32():
    """Many blocks are not less exact than one."""
    features = torch.randn(1, 8, 8, 16, dtype=torch.bfloat16, requires_grad=True)
    rows, columns = torch.rand(1, 64, 8), torch.rand(1, 64, 8)
    gradient = torch.randn(1, 64, 16, dtype=torch.bfloat16)
    exact = features.detach().double().requires_grad_()
    sample_separably_plain(exact, rows.double(), columns.double()).backward(gradient.double())

    def error(elements):
        with resized_blocks(elements):
            (found,) = torch.autograd.grad(sample_separably(features, rows, columns), features, gradient)
        return (found.double() - exact.grad).norm() / exact.grad.norm()

    assert error(64) < 1.4 * error(10**6)  # accumulated in bfloat16, the error would be more than twice as large
