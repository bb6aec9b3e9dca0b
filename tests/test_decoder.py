"""samdetr.decoder: levels, refinement, gradient stops, initial state."""

import math

import pytest
import torch
from conftest import DN, MULTI_SCALE, make_input, tiny_config, tiny_model
from detectron2.modeling import build_model

from samdetr.decoder import QuerySelfAttention, level_of_layer


@pytest.mark.parametrize(
    ("layers", "levels", "expected"),
    [
        (6, 1, [0] * 6),
        (6, 3, [2, 2, 1, 1, 0, 0]),
        (6, 4, [3, 3, 2, 1, 1, 0]),
        (3, 3, [2, 1, 0]),
        (2, 3, [2, 1]),
        (5, 2, [1, 1, 1, 0, 0]),
    ],
)
def test_levels_go_from_coarse_to_fine(layers, levels, expected):
    assert level_of_layer(layers, levels) == expected


def test_query_self_attention_equals_the_loops():
    module = QuerySelfAttention(dim=8, num_heads=2)
    content, position = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)[None, None]
    out = module(content, position, mask)
    q = (module.query_content(content) + module.query_position(position))[0].view(4, 2, 4)
    k = (module.key_content(content) + module.key_position(position))[0].view(4, 2, 4)
    v = module.value(content)[0].view(4, 2, 4)
    for i in range(4):
        heads = []
        for m in range(2):
            seen = [j for j in range(4) if mask[0, 0, i, j]]
            weights = torch.stack([q[i, m] @ k[j, m] / math.sqrt(4) for j in seen]).softmax(0)
            heads.append(weights @ torch.stack([v[j, m] for j in seen]))
        assert torch.allclose(out[0, i], module.output(torch.cat(heads)), atol=1e-5)


def test_each_layer_learns_from_its_own_box_loss_only():
    model = tiny_model().eval()
    predictions, _ = model.decode(model.preprocess_images([make_input(64, 64)]), None)
    boxes = predictions["pred_boxes"]

    def gradient(layer, parameter):
        return torch.autograd.grad(boxes[layer].sum(), parameter, retain_graph=True)[0]

    heads = [head.layers[-1].weight for head in model.decoder.box_heads]
    for predicted in range(3):
        for head in range(3):
            assert gradient(predicted, heads[head]).any() == (predicted == head)
    # The learned reference boxes learn as boxes from the first layer; later ones reach them through contents only.
    assert gradient(0, model.query_generator.reference_logits).abs().min() > 0


def test_boxes_of_a_new_model_are_the_reference_boxes():
    """The last box layers start at zero, and the class scores at the prior."""
    model = build_model(tiny_config()).eval()
    out = model.predict([make_input(64, 64)])
    reference = model.query_generator.reference_logits.sigmoid()
    for layer in range(3):
        assert torch.allclose(out["pred_boxes"][layer, 0], reference, atol=1e-6)
    for head in model.decoder.class_heads:
        assert torch.allclose(head.bias.sigmoid(), torch.tensor(0.01))
    assert 0.5 < model.query_generator.reference_logits.std() < 1.5


def test_coarse_levels_are_read_first():
    """Without the encoder's mixing, a change of the finest level reaches only the last layer's output."""
    model = tiny_model(*MULTI_SCALE, "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 0).eval()
    images = model.preprocess_images([make_input(64, 64)])
    features = model.backbone(images.tensor)
    levels = model.feature_projection([features[name] for name in model.in_features], images.image_sizes)
    queries = model.query_generator(1)
    before = model.decoder(queries, levels)["pred_logits"]
    levels[0].features = levels[0].features + 1
    after = model.decoder(queries, levels)["pred_logits"]
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_denoising_queries_do_not_disturb_the_matching_queries():
    model = tiny_model(*DN)
    inputs = [make_input(64, 64, [(5, 5, 30, 40), (20, 20, 60, 60)], [1, 3]), make_input(64, 64, [(1, 2, 9, 9)], [0])]
    images = model.preprocess_images(inputs)
    model.backbone.eval()  # batch statistics apart, training and evaluation are the same function
    with_denoising, queries = model.decode(images, model.prepare_targets(inputs))
    without, _ = model.decode(images, None)
    assert queries.content.shape[1] == 12 + 5 * 2
    for name in ("pred_logits", "pred_boxes"):
        assert torch.allclose(with_denoising[name][:, :, :12], without[name], atol=1e-5)
