"""samdetr.modeling.meta_arch: the model as a whole."""

import functools
import math

import pytest
import torch
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

import samdetr
from helpers import BEYOND, CONTRASTIVE, DN, MULTI_SCALE, PLAIN, SMCA, load_config, make_input, tiny_config, tiny_model
from oracles import plain_align, plain_attention
from samdetr.errors import UserError
from samdetr.modeling.build import build_detector
from samdetr.modeling.structures import AlignedQuery


def baseline(attention):
    """A decoder without aligner and refinement."""
    options = ["MODEL.SAMDETR.ALIGNER.NAME", "IdentityAligner", "MODEL.SAMDETR.DECODER.BOX_REFINEMENT", False]
    return [*options, "MODEL.SAMDETR.CROSS_ATTENTION.NAME", attention]


VARIANTS = {
    "plain": PLAIN,
    "smca": SMCA,
    "dn": [*PLAIN, *DN],
    "multi-scale": [*PLAIN, *MULTI_SCALE],
    "multi-scale smca dn": [*SMCA, *DN, *MULTI_SCALE],
    "detr": baseline("MultiHeadCrossAttention"),
    "conditional dn": [*baseline("ConditionalCrossAttention"), *DN],
    "deformable": [*baseline("DeformableCrossAttention"), *MULTI_SCALE],
    "beyond": [*SMCA, *BEYOND],
    "multi-scale smca dn beyond": [*SMCA, *CONTRASTIVE, *MULTI_SCALE, *BEYOND],
    "shared keypoints": [*SMCA, "MODEL.SAMDETR.ALIGNER.NUM_KEYPOINTS", 2],
}


variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


TWO_BOXES = [(10, 12, 40, 50), (30, 5, 62, 33)]


@variants
def test_training_returns_weighted_losses_that_reach_every_parameter(options):
    model = tiny_model(*options)
    inputs = [make_input(64, 80, TWO_BOXES, [3, 7]), make_input(72, 56, [(0, 0, 20, 20)], [1], seed=1)]
    losses = model(inputs)
    expected = {f"{p}_{n}{s}" for p in ("loss", "loss_dn") for n in ("class", "l1", "giou") for s in ("", "_0", "_1")}
    if "DenoisingQueryGenerator" not in options:
        expected = {name for name in expected if "dn" not in name}
    if "MODEL.SAMDETR.DENSE_HEAD.ENABLED" in options:
        expected |= {f"loss_{part}_{n}" for part in ("proposal", "dense") for n in ("class", "l1", "giou")}
    assert set(losses) == expected
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize(
    "options",
    [SMCA, [*PLAIN, *MULTI_SCALE, "MODEL.SAMDETR.ALIGNER.POOLED_CONTENT", True]],
    ids=["smca", "multi-scale pooled content"],
)
def test_losses_and_gradients_equal_the_plain_formulation(options):
    """The whole model against itself with aligner and cross-attention written query by query, pixel by pixel."""
    model = tiny_model(*options, "MODEL.SAMDETR.NUM_QUERIES", 6).eval()  # the backbone's running statistics
    model.training = True
    inputs = [make_input(64, 48, TWO_BOXES, [3, 7]), make_input(40, 56, [(0, 0, 20, 20)], [1], seed=1)]

    def losses_and_gradients():
        model.zero_grad()
        losses = model(inputs)
        sum(losses.values()).backward()
        return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    losses, gradients = losses_and_gradients()
    for layer in model.decoder.layers:
        aligner, attention = layer.aligner, layer.cross_attention
        beta = getattr(attention, "gaussian_beta", None)
        aligner.forward = lambda *args, aligner=aligner: AlignedQuery(*plain_align(aligner, *args))
        attention.forward = lambda *args, attention=attention, beta=beta: plain_attention(attention, *args, beta=beta)
    plain_losses, plain_gradients = losses_and_gradients()
    for name, loss in losses.items():
        assert torch.isclose(loss, plain_losses[name], rtol=1e-4), name
    for name, gradient in gradients.items():
        scale = plain_gradients[name].abs().max().clamp(min=1e-3)
        assert (gradient - plain_gradients[name]).abs().max() < 1e-3 * scale, name


@variants
def test_a_batch_without_a_single_box_trains(options):
    model = tiny_model(*options)
    losses = model([make_input(64, 64), make_input(64, 48)])
    sum(losses.values()).backward()
    # The same parameters get gradients as with boxes, so that processes with and without boxes agree.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_class"] > 0 and losses["loss_l1"] == 0


def test_losses_do_not_depend_on_the_order_of_the_batch():
    model = tiny_model().eval()
    model.training = True  # losses, but with the backbone's running statistics
    inputs = [make_input(64, 80, TWO_BOXES, [3, 7]), make_input(72, 56, [(0, 0, 20, 20)], [1], seed=1)]
    forward, backward = model(inputs), model(inputs[::-1])
    assert all(torch.isclose(forward[name], backward[name], rtol=1e-4) for name in forward)


def test_detections_have_the_output_size_and_are_clipped():
    model = tiny_model().eval()
    (result,) = model([{**make_input(64, 80), "height": 128, "width": 160}])
    instances = result["instances"]
    assert instances.image_size == (128, 160)
    boxes = instances.pred_boxes.tensor
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 160 and boxes[:, 3].max() <= 128
    assert boxes[:, 2].max() > 80  # scaled, not only cut
    assert len(instances) == 100 and (instances.scores[:-1] >= instances.scores[1:]).all()


def transformer_outputs(model, features, image_sizes):
    return model.decode(model.encoder(model.feature_projection(features, image_sizes)))[0]


@variants
def test_padding_is_invisible_from_the_backbone_on(options):
    """The second image's outputs are the same with and without the first beside it."""
    model = tiny_model(*options).eval()
    sizes = [(96, 128), (77, 65)]
    strides = model.feature_projection.strides
    full = [torch.randn(2, s.channels, 96 // s.stride, 128 // s.stride) for s in shapes_of(model)]
    together = transformer_outputs(model, full, sizes)
    cut = [x[1:, :, : math.ceil(77 / s), : math.ceil(65 / s)] for x, s in zip(full, strides)]
    alone = transformer_outputs(model, cut, sizes[1:])
    first = transformer_outputs(model, [x[:1] for x in full], sizes[:1])
    for name in ("logits", "boxes"):
        assert torch.allclose(getattr(together, name)[:, 1:], getattr(alone, name), atol=1e-5)
        assert torch.allclose(getattr(together, name)[:, :1], getattr(first, name), atol=1e-5)
        # Padding differs from the image: reading it would show.
        assert not torch.allclose(getattr(together, name)[:, :1], getattr(together, name)[:, 1:], atol=1e-3)


sides = st.integers(33, 150)


@functools.cache
def model_of_all_examples():
    return tiny_model(*SMCA, *MULTI_SCALE, *BEYOND).eval()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sides, sides), min_size=2, max_size=3))
def test_padding_is_invisible_for_any_sizes(sizes):
    model = model_of_all_examples()
    height, width = (math.ceil(max(side) / 32) * 32 for side in zip(*sizes))
    maps = [torch.randn(len(sizes), s.channels, height // s.stride, width // s.stride) for s in shapes_of(model)]
    together = transformer_outputs(model, maps, sizes)
    strides = model.feature_projection.strides
    for i, (h, w) in enumerate(sizes):
        cut = [x[i : i + 1, :, : math.ceil(h / s), : math.ceil(w / s)] for x, s in zip(maps, strides)]
        alone = transformer_outputs(model, cut, [(h, w)])
        for name in ("logits", "boxes"):
            assert torch.allclose(getattr(together, name)[:, i : i + 1], getattr(alone, name), atol=2e-5)


numbers = st.floats(-50, 150, width=32, allow_subnormal=False)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=6))
def test_targets_of_any_boxes_are_usable(boxes):
    (target,) = model_of_all_examples().prepare_targets([make_input(40, 80, boxes, [1] * len(boxes))])
    assert (target.boxes[:, 2:] > 0).all() and target.boxes.isfinite().all()
    corners = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
    assert len(target) == len(corners)


def shapes_of(model):
    shapes = model.backbone.output_shape()
    return [shapes[name] for name in model.in_features]


def test_images_of_other_sizes_in_the_batch_change_only_the_response_at_the_border():
    """End to end; by how much is in docs/models.md."""
    model = tiny_model().eval()
    small, large = make_input(64, 64, seed=1), make_input(64, 128, seed=2)
    alone = model.predict([small])
    together = model.predict([small, large])
    same = model.predict([small, make_input(64, 64, seed=3)])
    assert torch.allclose(alone["pred_logits"], same["pred_logits"][:, :1], atol=1e-5)
    assert 1e-4 < (alone["pred_logits"] - together["pred_logits"][:, :1]).abs().max() < 1.0


def test_every_width_is_free():
    options = [
        *("MODEL.SAMDETR.HIDDEN_DIM", 24, "MODEL.SAMDETR.NUM_HEADS", 3, "MODEL.SAMDETR.NUM_QUERIES", 5),
        *("MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 6, "MODEL.SAMDETR.ALIGNER.POOLED_SIZE", 4),
        *("MODEL.SAMDETR.ALIGNER.REDUCTION", 2, "MODEL.SAMDETR.ALIGNER.KEYPOINT_HIDDEN_DIMS", [9]),
        *("MODEL.SAMDETR.DECODER.NUM_LAYERS", 5, "MODEL.SAMDETR.DECODER.FEEDFORWARD_DIM", 17),
        *("MODEL.SAMDETR.ENCODER.NUM_LAYERS", 2, "MODEL.SAMDETR.ENCODER.FEEDFORWARD_DIM", 11),
        *("MODEL.SAMDETR.NUM_CLASSES", 3, "MODEL.SAMDETR.ENCODER.NUM_POINTS", 2, *DN, *MULTI_SCALE),
    ]
    model = tiny_model(*options)
    out = model.predict([make_input(64, 64)])
    assert out["pred_logits"].shape == (5, 1, 5, 3) and out["pred_boxes"].shape == (5, 1, 5, 4)
    sum(model([make_input(64, 64, TWO_BOXES, [0, 2])]).values()).backward()


def test_identity_aligner_by_config():
    model = tiny_model("MODEL.SAMDETR.ALIGNER.NAME", "IdentityAligner")
    sum(model([make_input(64, 64, TWO_BOXES, [0, 2])]).values()).backward()
    assert model.decoder.layers[0].aligner.scales.weight.grad is not None


def test_dense_encoder_with_several_levels():
    model = tiny_model(*MULTI_SCALE, "MODEL.SAMDETR.ENCODER.NAME", "TransformerEncoder")
    sum(model([make_input(64, 64, TWO_BOXES, [0, 2]), make_input(64, 48)]).values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.encoder.parameters() if p.dim() > 1)


def resnet_options(depth, features):
    widths = ["MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64 if depth < 50 else 256]
    return ["MODEL.RESNETS.DEPTH", depth, *widths, "MODEL.RESNETS.OUT_FEATURES", features]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        [*resnet_options(18, ["res4", "res5"]), "MODEL.SAMDETR.IN_FEATURES", ["res4", "res5"]],
        [*resnet_options(101, ["res5"]), "MODEL.SAMDETR.IN_FEATURES", ["res5"]],
        [
            *resnet_options(18, ["res2", "res3", "res4", "res5"]),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
            *("MODEL.SAMDETR.IN_FEATURES", ["p3", "p4", "p5", "p6"], *MULTI_SCALE[4:]),
        ],
    ],
    ids=["ResNet-18, two levels", "ResNet-101", "FPN, four levels"],
)
def test_any_backbone_of_detectron2_serves(options):
    small = ["MODEL.SAMDETR.ENCODER.NUM_LAYERS", 1, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 4]
    model = build_model(load_config("sam_detr_pp_R_50_1x", *small, *options))
    losses = model([make_input(70, 96, TWO_BOXES, [0, 2]), make_input(64, 64)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert len(model.eval()([make_input(70, 96)])[0]["instances"]) > 0


def test_levels_must_exist_and_be_in_order():
    with pytest.raises(ValueError, match=r"IN_FEATURES is \['res9'\].*gives \['res3'\]"):
        build_model(tiny_config("MODEL.SAMDETR.IN_FEATURES", ["res9"]))
    with pytest.raises(ValueError, match="from the finest to the coarsest"):
        build_model(tiny_config(*MULTI_SCALE, "MODEL.SAMDETR.IN_FEATURES", ["res5", "res3"]))


def test_bad_targets_name_the_image():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"cat\.jpg.*labels from 10 to 10.*NUM_CLASSES is 10"):
        model([make_input(64, 64, [(0, 0, 5, 5)], [10], file_name="cat.jpg")])
    with pytest.raises(ValueError, match=r"cat\.jpg has a box that is not finite"):
        model([make_input(64, 64, [(0, 0, math.nan, 5)], [1], file_name="cat.jpg")])
    with pytest.raises(ValueError, match=r"cat\.jpg has no 'instances'"):
        model([{"image": torch.rand(3, 64, 64), "file_name": "cat.jpg"}])


def test_predictions_that_are_not_finite_name_the_image():
    model = tiny_model()
    bad = make_input(64, 64, TWO_BOXES, [0, 2], file_name="bad.jpg")
    bad["image"][0, 10, 10] = math.nan
    model.eval().training = True
    with pytest.raises(UserError, match=r"bad\.jpg"):
        model([make_input(64, 64, TWO_BOXES, [0, 2], file_name="good.jpg"), bad])


def test_boxes_without_area_are_left_out():
    model = tiny_model()
    boxes = [(5, 5, 5, 20), (5, 5, 20, 20), (9, 9, 3, 3)]
    (target,) = model.prepare_targets([make_input(40, 80, boxes, [1, 2, 3])])
    assert target.labels.tolist() == [2]
    assert torch.allclose(target.boxes, torch.tensor([[12.5 / 80, 12.5 / 40, 15 / 80, 15 / 40]]))


def test_built_from_python_without_a_config():
    """Constructors take plain values and built parts."""
    reference = tiny_model(*PLAIN).eval()
    from samdetr.modeling.cross_attention import CrossAttention
    from samdetr.modeling.decoder import Decoder, DecoderLayer
    from samdetr.modeling.encoder import TransformerEncoder
    from samdetr.modeling.feature_projection import FeatureProjection
    from samdetr.modeling.query_generator import LearnedQueryGenerator
    from samdetr.modeling.semantics_aligner import SemanticsAligner

    layers = [
        DecoderLayer(
            dim=32,
            num_heads=4,
            feedforward_dim=48,
            temperature=1e4,
            aligner=SemanticsAligner(
                dim=32, num_heads=4, pooled_size=7, reduction=4, hidden_dims=[16, 16], temperature=1e4
            ),
            cross_attention=CrossAttention(dim=32, num_heads=4),
        )
        for _ in range(3)
    ]
    stride = reference.feature_projection.strides
    channels = [shape.channels for shape in shapes_of(reference)]
    model = samdetr.SAMDETR(
        backbone=reference.backbone,
        in_features=reference.in_features,
        feature_projection=FeatureProjection(
            in_channels=channels, strides=stride, dim=32, num_groups=8, temperature=1e4
        ),
        encoder=TransformerEncoder(dim=32, num_heads=4, feedforward_dim=48, num_layers=1),
        query_generator=LearnedQueryGenerator(num_queries=12, dim=32),
        decoder=Decoder(layers=layers, dim=32, num_classes=10, prior_prob=0.01),
        criterion=reference.criterion,
        num_classes=10,
        max_detections=100,
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    ).eval()
    model.load_state_dict(reference.state_dict())
    inputs = [make_input(64, 64)]
    assert torch.equal(model.predict(inputs)["pred_logits"], reference.predict(inputs)["pred_logits"])


def test_weights_that_are_not_finite_are_refused_in_evaluation():
    model = tiny_model().eval()
    torch.nn.init.constant_(model.decoder.box_heads[-1].layers[-1].bias, math.nan)
    with pytest.raises(UserError, match=r"predictions for image a\.jpg are not finite: its weights are of no use"):
        model([make_input(64, 64, file_name="a.jpg")])


@pytest.mark.parametrize(
    "options", [["MODEL.RESNETS.NORM", "GN"], ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]]
)
def test_parts_that_do_not_fit_together_are_refused(options):
    with pytest.raises(UserError, match=r"cannot be built from the MODEL keys of the config \(.*\.py, line \d+\)"):
        build_detector(tiny_config(*options))
