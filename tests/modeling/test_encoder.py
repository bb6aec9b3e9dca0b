"""samdetr.modeling.encoder: padding is invisible in both encoders, and attention is torch's."""

import pytest
import torch

from helpers import make_level
from samdetr.modeling.encoder import DeformableTransformerEncoder, PixelSelfAttention, TransformerEncoder
from samdetr.modeling.levels import pixel_points, points_in_padded_maps


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


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["dense", "deformable"])
def test_padding_is_invisible(name, mixed):
    encoder = make_encoder(name).eval()
    fine, coarse = torch.randn(2, 6, 8, 16), torch.randn(2, 3, 4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        padded = encoder([make_level(fine, [[6, 8], [4, 5]]), make_level(coarse, [[3, 4], [2, 3]])])
        alone = encoder([make_level(fine[1:, :4, :5], [[4, 5]]), make_level(coarse[1:, :2, :3], [[2, 3]])])
    tolerance = 0.05 if mixed else 1e-5
    assert torch.allclose(padded[0].features[1, :4, :5], alone[0].features[0], atol=tolerance)
    assert torch.allclose(padded[1].features[1, :2, :3], alone[1].features[0], atol=tolerance)
    assert all(level.features.isfinite().all() for level in padded)


def test_one_level_may_be_padded_and_another_not():
    encoder = make_encoder("deformable").eval()
    levels = [
        make_level(torch.randn(2, 6, 8, 16), [[6, 8], [6, 7]]),
        make_level(torch.randn(2, 3, 4, 16), [[3, 4]] * 2),
    ]
    levels[1].position = levels[1].position[:1]
    assert encoder(levels)[1].features.shape == (2, 3, 4, 16)


def test_reference_points_are_the_pixel_centres_of_the_valid_part():
    level = make_level(torch.zeros(1, 2, 4, 4), [[2, 2]])
    points = points_in_padded_maps(pixel_points([level])[:, :, None], [level])
    # In units of the padded map: two valid columns of four.
    assert torch.allclose(points[0, :2, 0, 0], torch.tensor([[0.125, 0.25], [0.375, 0.25]]))


def test_attention_of_pixels_is_torchs():
    ours = PixelSelfAttention(dim=16, num_heads=2)
    torchs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torchs.load_state_dict(ours.state_dict())
    x, position = torch.randn(2, 7, 16, requires_grad=True), torch.randn(1, 7, 16)
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    for mask in (None, padding):
        bias = None if mask is None else torch.zeros(2, 1, 1, 7).masked_fill(mask[:, None, None], -torch.inf)
        q = x + position
        expected, _ = torchs(q, q, x, key_padding_mask=mask, need_weights=False)
        found = ours(x, position, bias)
        assert torch.allclose(found, expected, atol=1e-5)
        gradient = torch.randn_like(found)
        gradients = [
            torch.autograd.grad(y, [x, *m.parameters()], gradient) for y, m in ((found, ours), (expected, torchs))
        ]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))
