"""samdetr.modeling.feature_projection: padding is invisible, sizes and positions are right."""

import torch

from samdetr.modeling.feature_projection import FeatureProjection, MaskedGroupNorm, make_padding_mask
from samdetr.modeling.position_encoding import pixel_position_encoding


def test_masked_group_norm_is_group_norm_of_the_valid_part():
    norm = MaskedGroupNorm(2, 8)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = 3 + torch.randn(2, 6, 5, 8)
    valid_size = torch.tensor([[6, 5], [4, 3]])
    out = norm(x, make_padding_mask((6, 5), valid_size))
    for image, (height, width) in enumerate(valid_size.tolist()):
        valid = x[image : image + 1, :height, :width]
        expected = torch.nn.functional.group_norm(valid.permute(0, 3, 1, 2), 2, norm.weight, norm.bias)
        assert torch.allclose(out[image, :height, :width], expected[0].permute(1, 2, 0), atol=1e-5)
    assert out.isfinite().all()


def test_level_embeddings_are_normal():
    projection = FeatureProjection(in_channels=[3, 5], strides=[8, 16], dim=256, num_groups=2, temperature=100.0)
    assert 0.9 < projection.level_embedding.std() < 1.1 and projection.level_embedding.mean().abs() < 0.15


def test_valid_sizes_round_up_and_positions_follow_them():
    projection = FeatureProjection(in_channels=[3, 5], strides=[8, 16], dim=8, num_groups=2, temperature=100.0)
    features = [torch.randn(2, 3, 9, 10), torch.randn(2, 5, 5, 5)]
    levels = projection(features, image_sizes=[(65, 80), (57, 72)])
    assert levels[0].valid_size.tolist() == [[9, 10], [8, 9]]
    assert levels[1].valid_size.tolist() == [[5, 5], [4, 5]]
    assert levels[0].padding_mask[1].sum() == 9 * 10 - 9 * 8
    expected = pixel_position_encoding((5, 5), levels[1].valid_size, 8, 100.0) + projection.level_embedding[1]
    assert torch.allclose(levels[1].position, expected)


def test_a_batch_without_padding_has_no_mask_and_one_position_for_all():
    projection = FeatureProjection(in_channels=[3], strides=[8], dim=8, num_groups=0, temperature=100.0)
    (level,) = projection([torch.randn(3, 3, 4, 6)], image_sizes=[(32, 48), (31, 47), (25, 41)])
    assert level.padding_mask is None
    assert level.position.shape == (1, 4, 6, 8)
    assert level.valid_size.tolist() == [[4, 6]] * 3
    assert projection.level_embedding is None and projection.norms is None
