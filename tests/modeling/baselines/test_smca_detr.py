"""samdetr.modeling.baselines.smca_detr against torch's transformer layers and the paper's equations, pixel by pixel."""

import math

import pytest
import torch

from helpers import make_level
from samdetr.modeling.baselines.smca_detr import (
    DownsamplingProjection,
    ObjectQueries,
    SMCADecoder,
    SMCADecoderLayer,
    SMCAEncoder,
    SMCAEncoderLayer,
    SpatiallyModulatedAttention,
)

SIZE = {"dim": 16, "num_heads": 4, "dropout": 0.0}
LEVELS = [((4, 6), [[4, 6], [3, 4]]), ((2, 3), [[2, 3], [2, 2]])]  # each map's size, and its valid sizes


def make_levels():
    return [make_level(torch.randn(2, *size, 16), valid) for size, valid in LEVELS]


def make_attention(num_levels, beta=8.0):
    module = SpatiallyModulatedAttention(**SIZE, num_levels=num_levels, gaussian_beta=beta)
    for linear in (module.offsets, module.scales):  # so that queries differ
        torch.nn.init.normal_(linear.weight, std=0.2)
    return module


def plain_attention(module, query, centres, levels):
    """The definition, pixel by pixel."""
    result = torch.zeros_like(query)
    heads, width = module.num_heads, query.shape[-1] // module.num_heads
    keys = [module.key(level.features + level.position) for level in levels]
    vectors = [module.value(level.features) for level in levels]
    for b in range(len(query)):
        for n in range(query.shape[1]):
            o = query[b, n]
            share = module.level_logits(o).softmax(0) if len(levels) > 1 else torch.ones(1)
            q, offsets, scales = module.query(o), module.offsets(o), module.scales(o)
            combined = torch.zeros_like(o)
            for j, level in enumerate(levels):
                (fine_h, fine_w), (valid_h, valid_w) = levels[0].valid_size[b].tolist(), level.valid_size[b].tolist()
                for m in range(heads):
                    part = slice(m * width, (m + 1) * width)
                    cx = centres[b, n, 0] * fine_w + offsets[2 * m]
                    cy = centres[b, n, 1] * fine_h + offsets[2 * m + 1]
                    logits, values = [], []
                    for y in range(int(valid_h)):
                        for x in range(int(valid_w)):
                            dx, dy = (x + 0.5) * fine_w / valid_w - cx, (y + 0.5) * fine_h / valid_h - cy
                            square = (scales[2 * m] * dx) ** 2 + (scales[2 * m + 1] * dy) ** 2
                            gaussian = torch.exp(-square / module.gaussian_beta)
                            logit = q[part] @ keys[j][b, y, x, part] / math.sqrt(width)
                            logits.append(logit + gaussian.log())
                            values.append(vectors[j][b, y, x, part])
                    combined[part] += share[j] * (torch.stack(logits).softmax(0) @ torch.stack(values))
            result[b, n] = module.output(combined)
    return result


@pytest.mark.parametrize("num_levels", [1, 2])
def test_attention_is_the_papers(num_levels):
    module, levels = make_attention(num_levels), make_levels()[:num_levels]
    query, centres = torch.randn(2, 2, 16), torch.rand(2, 2, 2)
    found, expected = module(query, centres, levels), plain_attention(module, query, centres, levels)
    assert torch.allclose(found, expected, atol=1e-5)
    gradient = torch.randn_like(found)
    parameters = list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters, gradient), torch.autograd.grad(expected, parameters, gradient)
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_gaussians_start_round_and_near_the_centre():
    module = SpatiallyModulatedAttention(**SIZE, num_levels=1, gaussian_beta=8.0)
    level = make_level(torch.randn(1, 30, 40, 16), [[30, 40]])
    centre = torch.tensor([[[0.5, 0.5]]])
    with torch.no_grad():
        gaussian = module.log_gaussians(torch.randn(1, 1, 16), centre, level, level).view(4, 30, 40)
    offsets = module.offsets.bias.tolist()
    for m, map_ in enumerate(gaussian):
        y, x = divmod(int(map_.argmax()), 40)
        assert abs(x + 0.5 - 20) <= 4.5 and abs(y + 0.5 - 15) <= 4.5
        cx, cy = 20 + offsets[2 * m], 15 + offsets[2 * m + 1]
        assert map_[3, 7].item() == pytest.approx(-((7.5 - cx) ** 2 + (3.5 - cy) ** 2) / 8, rel=1e-4)


def test_encoder_layer_is_torchs():
    ours = SMCAEncoderLayer(**SIZE, feedforward_dim=24)
    torchs = torch.nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    copy(ours, torchs)
    x, mask = torch.randn(2, 7, 16), torch.tensor([[False] * 7, [False] * 5 + [True] * 2])
    expected = torchs(x, src_key_padding_mask=mask)
    assert torch.allclose(ours(x, torch.zeros(1, 7, 16), mask), expected, atol=1e-5)


def test_decoder_layer_is_torchs_with_gaussians_that_are_flat():
    ours = SMCADecoderLayer(**SIZE, feedforward_dim=24, num_levels=1, gaussian_beta=1e12)
    torchs = torch.nn.TransformerDecoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
    copy(ours, torchs, cross="multihead_attn")
    attention = ours.cross_attention
    with torch.no_grad():
        parts = [attention.query, attention.key, attention.value]
        torchs.multihead_attn.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        torchs.multihead_attn.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
    torchs.multihead_attn.out_proj.load_state_dict(attention.output.state_dict())
    level = make_level(torch.randn(2, 4, 5, 16), [[4, 5], [2, 3]])
    level.position = torch.zeros_like(level.position)
    content = torch.randn(2, 3, 16)
    expected = torchs(content, level.features.flatten(1, 2), memory_key_padding_mask=level.padding_mask.flatten(1))
    found = ours(content, torch.zeros(1, 3, 16), torch.rand(2, 3, 2), [level])
    assert torch.allclose(found, expected, atol=1e-5)


def copy(ours, torchs, cross=None):
    """Give torch's layer the weights of ours, but for cross-attention; none of them is as it started."""
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    torchs.self_attn.load_state_dict(ours.self_attention.state_dict())
    torchs.linear1.load_state_dict(ours.feedforward[0].state_dict())
    torchs.linear2.load_state_dict(ours.feedforward[3].state_dict())
    norms = [ours.self_attention_norm, *([ours.cross_attention_norm] if cross else []), ours.feedforward_norm]
    for i, norm in enumerate(norms, start=1):
        getattr(torchs, f"norm{i}").load_state_dict(norm.state_dict())


def test_encoder_attends_within_levels_and_in_the_middle_across_them():
    encoder = SMCAEncoder(layers=[SMCAEncoderLayer(**SIZE, feedforward_dim=24) for _ in range(3)])
    levels = [make_level(torch.randn(1, *size, 16), [list(size)]) for size, _ in LEVELS]
    first, middle, last = encoder.layers
    maps = [level.features.flatten(1, 2) for level in levels]
    positions = [level.position.flatten(1, 2) for level in levels]
    maps = [first(x, p, None) for x, p in zip(maps, positions)]
    sizes = [x.shape[1] for x in maps]
    maps = middle(torch.cat(maps, 1), torch.cat(positions, 1), None).split(sizes, 1)
    maps = [last(x, p, None) for x, p in zip(maps, positions)]
    for level, expected in zip(encoder(levels), maps):
        assert torch.allclose(level.features.flatten(1, 2), expected, atol=1e-5)


def test_further_level_is_every_second_pixel_of_the_coarsest():
    projection = DownsamplingProjection(in_channels=[6, 8], strides=[16, 32], dim=16, num_groups=0, temperature=10000.0)
    features = [torch.randn(2, 6, 10, 14), torch.randn(2, 8, 5, 7)]
    fine, coarse, further = projection(features, [(160, 224), (100, 140)])
    assert fine.size == (10, 14) and coarse.size == (5, 7) and further.size == (3, 4)
    assert torch.equal(further.features, coarse.features[:, ::2, ::2])
    assert further.valid_size.tolist() == [[3, 4], [2, 3]]
    assert len(projection.level_embedding) == 3 and not torch.equal(*projection.level_embedding[1:])


def test_boxes_are_relative_to_the_predicted_centres():
    queries = ObjectQueries(num_queries=3, dim=16)
    layers = [SMCADecoderLayer(**SIZE, feedforward_dim=24, num_levels=2, gaussian_beta=8.0) for _ in range(2)]
    decoder = SMCADecoder(layers=layers, dim=16, num_classes=5, prior_prob=0.01)
    levels = make_levels()
    batch = queries(levels)
    assert not batch.content.any() and torch.equal(batch.position[0], queries.embedding)
    predictions = decoder(batch, levels)
    assert predictions.logits.shape == (2, 2, 3, 5) and predictions.boxes.shape == (2, 2, 3, 4)
    centres = queries.centre_head(queries.embedding).sigmoid()
    expected = torch.cat([centres, torch.full_like(centres, 0.5)], dim=-1)  # the box head starts at zero
    assert torch.allclose(predictions.boxes, expected.expand(2, 2, -1, -1), atol=1e-6)
    torch.nn.init.normal_(decoder.box_head.layers[-1].weight)
    moved = decoder(batch, levels).boxes.logit() - expected.logit()
    assert torch.allclose(moved[1], decoder.box_head(decoder.norm(last_content(decoder, batch, levels))), atol=1e-4)


def last_content(decoder, queries, levels):
    content = queries.content
    for layer in decoder.layers:
        content = layer(content, queries.position, queries.reference_logits[..., :2].sigmoid(), levels)
    return content


def test_dropout_is_for_training_only():
    options = {**SIZE, "dropout": 0.5, "feedforward_dim": 24}
    encoder, decoder = SMCAEncoderLayer(**options), SMCADecoderLayer(**options, num_levels=1, gaussian_beta=8.0)
    x, level = torch.randn(2, 7, 16), make_level(torch.randn(2, 4, 5, 16), [[4, 5], [4, 5]])
    calls = {
        encoder: lambda: encoder(x, torch.zeros(1, 7, 16), None),
        decoder.cross_attention: lambda: decoder.cross_attention(x, torch.full((2, 7, 2), 0.5), [level]),
        decoder: lambda: decoder(x, torch.zeros(1, 7, 16), torch.full((2, 7, 2), 0.5), [level]),
    }
    for module, call in calls.items():
        assert not torch.allclose(call(), call())
        module.eval()
        assert torch.equal(call(), call())
