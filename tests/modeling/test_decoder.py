"""samdetr.modeling.decoder: levels, refinement, gradient stops, initial state."""

import math

import pytest
import torch
from detectron2.modeling import build_model

from helpers import DN, MULTI_SCALE, make_input, tiny_config, tiny_model
from samdetr.modeling.boxes import offsets_in_boxes
from samdetr.modeling.decoder import QuerySelfAttention, level_of_layer
from samdetr.modeling.structures import QueryBatch


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
    queries = QueryBatch(content, torch.zeros(1, 4, 4), attention_mask=mask)
    out = module(content, position, queries.attention_bias(torch.float32))
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
    predictions, _ = model.decode(model.encode(model.preprocess_images([make_input(64, 64)]).tensor, None))
    boxes = predictions.boxes

    def gradient(layer, parameter):
        return torch.autograd.grad(boxes[layer].sum(), parameter, retain_graph=True)[0]

    heads = [head.layers[-1].weight for head in model.decoder.box_heads]
    for predicted in range(3):
        for head in range(3):
            assert gradient(predicted, heads[head]).any() == (predicted == head)
    # The learned reference boxes learn as boxes from the first layer; later ones reach them through contents only.
    assert gradient(0, model.query_generator.reference_logits).abs().min() > 0


def test_looking_forward_twice_gives_the_same_boxes_and_a_gradient_from_the_next_layer():
    once = tiny_model().eval()
    twice = tiny_model("MODEL.SAMDETR.DECODER.LOOK_FORWARD_TWICE", True).eval()
    twice.load_state_dict(once.state_dict())
    inputs = [make_input(64, 64)]
    assert torch.equal(once.predict(inputs)["pred_boxes"], twice.predict(inputs)["pred_boxes"])
    predictions, _ = twice.decode(twice.encode(twice.preprocess_images(inputs).tensor, None))
    heads = [head.layers[-1].weight for head in twice.decoder.box_heads]
    for predicted in range(3):
        gradients = torch.autograd.grad(predictions.boxes[predicted].sum(), heads, retain_graph=True, allow_unused=True)
        reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
        assert reached == [head in (predicted, predicted - 1) for head in range(3)]
    # The first two layers start from the learned boxes, which both of them move.
    learned = twice.query_generator.reference_logits
    first, second, third = (
        torch.autograd.grad(boxes.sum(), learned, retain_graph=True)[0].norm().item() for boxes in predictions.boxes
    )
    assert second == pytest.approx(first, rel=0.5) and third < 0.1 * first


def test_relative_offsets_are_those_of_each_layers_own_reference_box():
    model = tiny_model("MODEL.SAMDETR.RELATIVE_OFFSETS", True).eval()
    seen = []
    for layer, head in zip(model.decoder.layers, model.decoder.box_heads):
        layer.aligner.register_forward_hook(lambda module, args, output: seen.append([args[1]]))
        head.register_forward_hook(lambda module, args, output: seen[-1].append(output))
    boxes = model.predict([make_input(64, 64)])["pred_boxes"]
    for (reference, offsets), found in zip(seen, boxes, strict=True):
        assert torch.allclose(found, (reference.logit() + offsets_in_boxes(offsets, reference)).sigmoid(), atol=1e-5)


def test_what_the_aligner_adds_reaches_the_contents():
    model = tiny_model("MODEL.SAMDETR.ALIGNER.POOLED_CONTENT", True).eval()
    plain = tiny_model().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = [make_input(64, 64)]
    before = model.predict(inputs)["pred_logits"]
    assert torch.equal(before, plain.predict(inputs)["pred_logits"])  # it starts as the published aligner
    torch.nn.init.normal_(model.decoder.layers[1].aligner.pooled_content.weight)
    after = model.predict(inputs)["pred_logits"]
    assert torch.equal(after[0], before[0]) and not torch.allclose(after[1], before[1], atol=1e-3)


def test_without_refinement_every_layer_starts_from_the_querys_own_box():
    model = tiny_model("MODEL.SAMDETR.DECODER.BOX_REFINEMENT", False).eval()
    seen = []
    for layer in model.decoder.layers:
        layer.aligner.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    boxes = model.predict([make_input(64, 64)])["pred_boxes"]
    reference = model.query_generator.reference_logits
    assert all(torch.equal(box[0], reference.sigmoid()) for box in seen)
    seen.clear()
    with torch.no_grad():
        model.decoder.box_heads[0].layers[-1].bias += 1.0
    moved = model.predict([make_input(64, 64)])["pred_boxes"]
    assert not torch.equal(moved[0], boxes[0]) and torch.equal(moved[1:], boxes[1:])


def test_no_gradient_flows_through_the_sine_embedding_of_self_attention():
    model = tiny_model()
    layer = model.decoder.layers[0]
    boxes = torch.rand(1, 12, 4, requires_grad=True)
    content = torch.randn(1, 12, 32, requires_grad=True)
    seen = {}
    layer.self_attention.register_forward_hook(lambda module, args, output: seen.update(output=output))
    (level,) = model.feature_projection([torch.randn(1, 32, 8, 8)], [(64, 64)])
    layer(content, boxes, [level], 0, None)
    assert torch.autograd.grad(seen["output"].sum(), boxes, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(seen["output"].sum(), content)[0].any()


def xavier_bound(weight):
    return math.sqrt(6 / sum(weight.shape))


def test_initial_state_of_every_matrix():
    """Xavier-uniform in encoder and decoder; torch's default in projections, class heads and inner box layers."""
    model = build_model(tiny_config("MODEL.SAMDETR.HIDDEN_DIM", 64, *DN))
    xavier, default = [], []
    for name, weight in model.named_parameters():
        if name.startswith("backbone.") or weight.dim() < 2 or "label_embedding" in name or "reference" in name:
            continue
        heads = "_heads." in name or name.startswith("feature_projection.")
        (default if heads else xavier).append((name, weight))
    assert any("in_proj_weight" in name and weight.shape == (3 * 64, 64) for name, weight in xavier)
    assert len(xavier) > 60 and len(default) > 9
    for name, weight in xavier:
        assert 0.85 < weight.abs().max() / xavier_bound(weight) <= 1, name  # the stacked matrix's bound, too
    for name, weight in default:
        if ".box_heads." in name and ".layers.2." in name:
            assert not weight.any(), name
        else:  # torch's: uniform up to 1 / sqrt(fan in)
            assert 0.85 < weight.abs().max() * math.sqrt(weight.shape[1]) <= 1, name
    for name, bias in model.named_parameters():
        attention_own = name.endswith(("attention.in_proj_bias", "attention.out_proj.bias", "attention.output.bias"))
        if attention_own or name.endswith(("keypoint_head.layers.2.bias", "box_heads.0.layers.2.bias")):
            assert not bias.any(), name
        elif name.startswith("decoder.layers") and name.endswith("bias") and "norm" not in name:
            assert bias.any(), name
    assert 0.8 < model.query_generator.label_embedding.weight.std() < 1.2


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
    queries = model.query_generator(levels)
    before = model.decoder(queries, levels).logits
    levels[0].features = levels[0].features + 1
    after = model.decoder(queries, levels).logits
    assert torch.equal(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


def test_denoising_queries_do_not_disturb_the_matching_queries():
    model = tiny_model(*DN)
    inputs = [make_input(64, 64, [(5, 5, 30, 40), (20, 20, 60, 60)], [1, 3]), make_input(64, 64, [(1, 2, 9, 9)], [0])]
    images = model.preprocess_images(inputs)
    model.backbone.eval()  # batch statistics apart, training and evaluation are the same function
    levels = model.encode(images.tensor, images.image_sizes)
    with_denoising, queries = model.decode(levels, model.prepare_targets(inputs))
    without, _ = model.decode(levels)
    assert queries.content.shape[1] == 12 + 5 * 2
    found = with_denoising.of_queries(slice(12))
    assert torch.allclose(found.logits, without.logits, atol=1e-5)
    assert torch.allclose(found.boxes, without.boxes, atol=1e-5)
