"""samdetr.encoder: padding is invisible in both encoders."""

import pytest
import torch

from samdetr.encoder import DeformableTransformerEncoder, TransformerEncoder, encoder_reference_points
from samdetr.feature_projection import padding_mask
from samdetr.position_encoding import pixel_position_encoding
from samdetr.structures import FeatureLevel


def make_level(features, valid_size):
    """A level of (B, H, W, C) features with (B, 2) valid widths and heights."""
    size = tuple(features.shape[1:3])
    valid_size = torch.tensor(valid_size, dtype=torch.float32)
    mask = padding_mask(size, valid_size)
    position = pixel_position_encoding(size, valid_size, features.shape[-1], 10000.0)
    return FeatureLevel(features, position, valid_size, mask if mask.any() else None)


def make_encoder(name):
    if name == "dense":
        return TransformerEncoder(dim=16, num_heads=2, feedforward_dim=24, num_layers=2)
    encoder = DeformableTransformerEncoder(
        dim=16, num_heads=2, feedforward_dim=24, num_layers=2, num_levels=2, num_points=2
    )
    for layer in encoder.layers:  # away from the uniform start
        torch.nn.init.normal_(layer.self_attention.sampling_offsets.weight, std=0.3)
        torch.nn.init.normal_(layer.self_attention.attention_weights.weight, std=0.3)
    return encoder


@pytest.mark.parametrize("name", ["dense", "deformable"])
def test_padding_is_invisible(name):
    encoder = make_encoder(name).eval()
    fine, coarse = torch.randn(2, 6, 8, 16), torch.randn(2, 3, 4, 16)
    padded = encoder([make_level(fine, [[8, 6], [5, 4]]), make_level(coarse, [[4, 3], [3, 2]])])
    alone = encoder([make_level(fine[1:, :4, :5], [[5, 4]]), make_level(coarse[1:, :2, :3], [[3, 2]])])
    assert torch.allclose(padded[0].features[1, :4, :5], alone[0].features[0], atol=1e-5)
    assert torch.allclose(padded[1].features[1, :2, :3], alone[1].features[0], atol=1e-5)
    assert all(level.features.isfinite().all() for level in padded)


def test_one_level_may_be_padded_and_another_not():
    encoder = make_encoder("deformable").eval()
    levels = [
        make_level(torch.randn(2, 6, 8, 16), [[8, 6], [7, 6]]),
        make_level(torch.randn(2, 3, 4, 16), [[4, 3]] * 2),
    ]
    levels[1].position = levels[1].position[:1]
    assert encoder(levels)[1].features.shape == (2, 3, 4, 16)


def test_reference_points_are_the_pixel_centres_of_the_valid_part():
    level = make_level(torch.zeros(1, 2, 4, 4), [[2, 2]])
    points = encoder_reference_points([level])
    # In units of the padded map: two valid columns of four.
    assert torch.allclose(points[0, :2, 0, 0], torch.tensor([[0.125, 0.25], [0.375, 0.25]]))
