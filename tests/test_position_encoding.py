"""samdetr.position_encoding against a loop over channels."""

import math

import pytest
import torch

from samdetr.position_encoding import pixel_position_encoding, sine_embedding


def plain_embedding(x, y, dim, temperature):
    values = []
    for coordinate in (y, x):
        for channel in range(dim // 2):
            angle = 2 * math.pi * coordinate / temperature ** (2 * (channel // 2) / (dim // 2))
            values.append(math.cos(angle) if channel % 2 else math.sin(angle))
    return torch.tensor(values)


@pytest.mark.parametrize("dim", [4, 16, 256])
def test_point_embedding(dim):
    points = torch.rand(5, 2)
    expected = torch.stack([plain_embedding(x, y, dim, 10000.0) for x, y in points.tolist()])
    assert torch.allclose(sine_embedding(points, dim, 10000.0), expected, atol=1e-5)


def test_pixels_are_embedded_at_their_centres_in_the_valid_part():
    valid_size = torch.tensor([[4.0, 3.0], [6.0, 5.0]])
    encoding = pixel_position_encoding((5, 6), valid_size, 8, 20.0)
    assert encoding.shape == (2, 5, 6, 8)
    for image, (width, height) in enumerate(valid_size.tolist()):
        for i in range(5):
            for j in range(6):
                expected = plain_embedding((j + 0.5) / width, (i + 0.5) / height, 8, 20.0)
                assert torch.allclose(encoding[image, i, j], expected, atol=1e-5)


def test_channels_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="even number"):
        sine_embedding(torch.rand(1, 2), 6, 10000.0)
