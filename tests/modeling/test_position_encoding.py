"""samdetr.modeling.position_encoding against a loop over channels."""

import pytest
import torch

from oracles import plain_embedding
from samdetr.modeling.position_encoding import pixel_position_encoding, sine_embedding


@pytest.mark.parametrize("dim", [4, 16, 256])
def test_point_embedding(dim):
    points = torch.rand(5, 2)
    expected = torch.stack([plain_embedding(x, y, dim, 10000.0) for x, y in points.tolist()])
    assert torch.allclose(sine_embedding(points, dim, 10000.0), expected, atol=1e-5)


def test_what_was_first_embedded_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        sine_embedding(torch.rand(5, 2), 12, 777.0)
    points = torch.rand(5, 2, requires_grad=True)
    sine_embedding(points, 12, 777.0).sum().backward()
    assert points.grad.abs().sum() > 0


def test_pixels_are_embedded_at_their_centres_in_the_valid_part():
    valid_size = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    encoding = pixel_position_encoding((5, 6), valid_size, 8, 20.0)
    assert encoding.shape == (2, 5, 6, 8)
    for image, (height, width) in enumerate(valid_size.tolist()):
        for i in range(5):
            for j in range(6):
                expected = plain_embedding((j + 0.5) / width, (i + 0.5) / height, 8, 20.0)
                assert torch.allclose(encoding[image, i, j], expected, atol=1e-5)


def test_channels_that_are_no_multiple_of_four_are_refused():
    with pytest.raises(ValueError, match="even number"):
        sine_embedding(torch.rand(1, 2), 6, 10000.0)
