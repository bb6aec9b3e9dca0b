"""samdetr.modeling.baselines.anchor_detr against attention with one weight for every pixel, and the paper's equations."""

import math

import pytest
import torch

from helpers import load_experiment, make_level
from samdetr.errors import UserError
from samdetr.modeling.baselines.anchor_detr import (
    AnchorDecoder,
    AnchorDecoderLayer,
    AnchorDETR,
    AnchorEncoderLayer,
    AnchorQueries,
    PositionEncoder,
    RowColumnAttention,
)
from samdetr.modeling.position_encoding import coordinate_embedding, sine_embedding

SIZE = {"dim": 16, "num_heads": 4}
VALID = [[4, 5], [2, 3]]


def full_attention(module, query_x, query_y, level, x, y):
    """Attend to every pixel with the product of its column's and its row's weight, image by image, head by head."""
    results = []
    heads, width = module.num_heads, query_x.shape[-1] // module.num_heads
    for b, (height, length) in enumerate(level.valid_size.int().tolist()):
        features = level.features[b, :height, :length]
        columns, rows = features.mean(0) + x[b, :length], features.mean(1) + y[b, :height]
        value = module.value(features).flatten(0, 1)
        parts = []
        for m in range(heads):
            part = slice(m * width, (m + 1) * width)
            q, k = module.query_x(query_x[b])[:, part], module.key_x(columns)[:, part]
            weights_x = (q @ k.T / math.sqrt(width)).softmax(-1)
            q, k = module.query_y(query_y[b])[:, part], module.key_y(rows)[:, part]
            weights_y = (q @ k.T / math.sqrt(width)).softmax(-1)
            weights = (weights_y[:, :, None] * weights_x[:, None]).flatten(1)  # (Q, H * W)
            assert torch.allclose(weights.sum(1), torch.ones(len(weights)), atol=1e-5)
            parts.append(weights @ value[:, part])
        results.append(module.output(torch.cat(parts, dim=1)))
    return torch.stack(results)


@pytest.mark.parametrize("valid", [VALID, [[4, 5], [4, 5]]], ids=["padded", "not padded"])
def test_row_column_attention_is_full_attention_whose_weights_are_products(valid):
    module, level = RowColumnAttention(**SIZE), make_level(torch.randn(2, 4, 5, 16), valid)
    arguments = torch.randn(2, 3, 16), torch.randn(2, 3, 16), level, torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    found, expected = module(*arguments), full_attention(module, *arguments)
    assert torch.allclose(found, expected, atol=1e-5)
    gradient, parameters = torch.randn_like(found), list(module.parameters())
    for a, b in zip(
        torch.autograd.grad(found, parameters, gradient), torch.autograd.grad(expected, parameters, gradient)
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_positions_of_queries_and_pixels_are_encoded_alike():
    positions = PositionEncoder(dim=16, temperature=10000.0)
    level = make_level(torch.randn(2, 4, 5, 16), VALID)
    x, y = positions.encode_pixels(level)
    assert x.shape == (2, 5, 16) and y.shape == (2, 4, 16)
    pixel = torch.tensor([[2.5 / 5, 1.5 / 4], [2.5 / 3, 1.5 / 2]])  # column 2, row 1 of both images
    of_x, of_y = positions.encode_coordinates(pixel)
    assert torch.allclose(x[:, 2], of_x, atol=1e-6) and torch.allclose(y[:, 1], of_y, atol=1e-6)
    expected = positions.of_coordinate(coordinate_embedding(pixel[:, 0], 16, 10000.0))
    assert torch.allclose(of_x, expected, atol=1e-6)
    expected = positions.of_point(sine_embedding(pixel, 16, 10000.0))
    assert torch.allclose(positions.encode_points(pixel), expected, atol=1e-6)


def test_encoder_layer_queries_with_every_pixel():
    layer, level = AnchorEncoderLayer(**SIZE, feedforward_dim=24), make_level(torch.randn(2, 4, 5, 16), VALID)
    x, y = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    found = layer(level, x, y).unflatten(1, (4, 5))
    for i, j in ((0, 0), (1, 2)):
        pixel = level.features[:, i, j]
        attended = full_attention(
            layer.self_attention, (pixel + x[:, j])[:, None], (pixel + y[:, i])[:, None], level, x, y
        )
        expected = layer.feedforward(layer.self_attention_norm(pixel + attended[:, 0]))
        assert torch.allclose(found[:, i, j], expected, atol=1e-5)


def test_every_pattern_is_at_every_point():
    queries = AnchorQueries(num_points=4, num_patterns=3, dim=16)
    batch = queries([make_level(torch.randn(2, 4, 5, 16), VALID)])
    assert batch.content.shape == (2, 12, 16) and batch.reference_logits.shape == (2, 12, 4)
    pairs = zip(batch.content[1], batch.reference_logits[1].sigmoid())
    found = {(tuple(content.tolist()), tuple(round(c, 4) for c in box[:2].tolist())) for content, box in pairs}
    points = [tuple(round(c, 4) for c in point) for point in queries.points.tolist()]
    assert found == {(tuple(pattern), point) for pattern in queries.patterns.tolist() for point in points}


def test_decoder_is_the_papers():
    positions = PositionEncoder(dim=16, temperature=10000.0)
    layers = [AnchorDecoderLayer(**SIZE, feedforward_dim=24) for _ in range(2)]
    decoder = AnchorDecoder(layers=layers, positions=positions, dim=16, num_classes=5, prior_prob=0.01)
    level = make_level(torch.randn(2, 4, 5, 16), VALID)
    queries = AnchorQueries(num_points=2, num_patterns=3, dim=16)
    batch = queries([level])
    start = decoder(batch, [level])
    points = queries.points.repeat(3, 1)
    assert torch.allclose(start.boxes[..., :2], points.expand(2, 2, -1, -1), atol=1e-5)
    assert torch.allclose(start.boxes[..., 2:], torch.tensor(-2.0).sigmoid())
    assert torch.allclose(decoder.class_head.bias.sigmoid(), torch.tensor(0.01))

    torch.nn.init.normal_(decoder.box_head.layers[-1].weight)
    content, position = batch.content, positions.encode_points(points)
    x, y = positions.encode_coordinates(points)
    for index, layer in enumerate(layers):
        q = content + position
        attended = layer.self_attention(q, q, content)[0]
        content = layer.self_attention_norm(content + attended)
        attended = full_attention(
            layer.cross_attention, content + x, content + y, level, *positions.encode_pixels(level)
        )
        content = layer.feedforward(layer.cross_attention_norm(content + attended))
        delta = decoder.box_head(content)
        delta[..., :2] += points.logit()
        predictions = decoder(batch, [level])
        assert torch.allclose(predictions.logits[index], decoder.class_head(content), atol=1e-4)
        assert torch.allclose(predictions.boxes[index], delta.sigmoid(), atol=1e-4)


def test_gradients_move_the_anchor_points_by_boxes_and_by_attention():
    queries = AnchorQueries(num_points=2, num_patterns=1, dim=16)
    level = make_level(torch.randn(1, 4, 5, 16), [[4, 5]])
    positions = PositionEncoder(dim=16, temperature=10000.0)
    layers = [AnchorDecoderLayer(**SIZE, feedforward_dim=24)]
    decoder = AnchorDecoder(layers=layers, positions=positions, dim=16, num_classes=5, prior_prob=0.01)
    predictions = decoder(queries([level]), [level])
    for output in (predictions.boxes[..., 0].sum(), predictions.logits.sum()):
        (gradient,) = torch.autograd.grad(output, queries.points, retain_graph=True)
        assert gradient.any() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.SAMDETR.NUM_QUERIES", 31], r"NUM_QUERIES \(31\) is not divisible by .*NUM_PATTERNS \(3\)"),
        (["MODEL.SAMDETR.IN_FEATURES", ["res2", "res3"]], "name one feature for AnchorDETR"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        AnchorDETR(load_experiment("anchor_detr", *options))
