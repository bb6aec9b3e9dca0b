"""The other detectors as a whole: their sizes, and what holds for each of them."""

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import samdetr
from helpers import load_config, load_experiment, make_input
from samdetr.checkpoint import describe_run
from samdetr.checks import check_model
from samdetr.errors import UserError
from samdetr.export import trace
from samdetr.solver import build_optimizer
from samdetr.visualization import record_attention

SMALL = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.SAMDETR.HIDDEN_DIM", 32),
    *("MODEL.SAMDETR.NUM_QUERIES", 12, "MODEL.SAMDETR.ENCODER.FEEDFORWARD_DIM", 48),
    *("MODEL.SAMDETR.DECODER.FEEDFORWARD_DIM", 48, "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 3),
]
LEVELS = ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4"], "MODEL.SAMDETR.IN_FEATURES", ["res3", "res4"]]
VARIANTS = {
    "SMCA-DETR": ("smca_detr", []),
    "SMCA-DETR, multi-scale": ("smca_detr", [*LEVELS, "MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 8]),
    "Anchor DETR": ("anchor_detr", ["MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 8]),
    "Sparse R-CNN": ("sparse_rcnn", []),
}
PROJECTIONS = ["query_x", "query_y", "key_x", "key_y", "value"]
TWO_BOXES = [(10, 12, 40, 50), (30, 5, 62, 33)]

variants = pytest.mark.parametrize("variant", VARIANTS)


def small_config(variant, *options):
    name, own = VARIANTS[variant]
    return load_experiment(name, *SMALL, *own, *options)


@pytest.mark.parametrize(
    ("name", "here", "published"),
    [
        ("smca_detr_R_50", 41.69e6, 42e6),
        ("smca_detr_R_50_DC5", 41.69e6, 42e6),
        ("smca_detr_pp_R_50", 40.64e6, 40e6),
        ("anchor_detr_R_50_DC5", 37.04e6, 39e6),
        ("sparse_rcnn_R_50_FPN", 106.29e6, 106e6),
    ],
)
def test_parameters_are_as_many_as_published(name, here, published):
    with torch.device("meta"):
        model = build_model(load_config(f"baselines/{name}_1x", "MODEL.DEVICE", "meta"))
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == pytest.approx(here, abs=0.01e6)
    # docs/baselines.md says what is known of Anchor DETR's.
    assert found == pytest.approx(published, rel=0.06 if "anchor" in name else 0.02)


@variants
def test_losses_of_every_layer_reach_every_parameter(variant):
    cfg = small_config(variant)
    check_model(cfg)
    model = build_model(cfg)
    inputs = [make_input(64, 80, TWO_BOXES, [3, 7]), make_input(72, 56, [(0, 0, 20, 20)], [1], seed=1)]
    for head in (m for name, m in model.named_modules() if name.endswith("box_head.layers.2")):
        torch.nn.init.normal_(head.weight, std=0.05)  # it starts at zero
    losses = model(inputs)
    assert set(losses) == {f"loss_{name}{layer}" for name in ("class", "l1", "giou") for layer in ("_0", "_1", "")}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    # Nothing to attend to while all contents are zero, and no box that is large enough for an FPN's coarse levels.
    idle = ("decoder.layers.0.self_attention", "backbone.fpn_")
    assert all(p.grad.any() for name, p in model.named_parameters() if not name.startswith(idle))

    model.zero_grad()
    losses = model([make_input(64, 64), make_input(64, 48)])  # without a single box
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_class"] > 0 and losses["loss_l1"] == 0


@variants
def test_trains_evaluates_and_loads_again(variant, tmp_path):
    cfg = small_config(variant, "SOLVER.BASE_LR", 1e-5)  # so low that every step is one down
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    inputs = [make_input(64, 96, [(5, 5, 40, 50)], [7]), make_input(80, 64)]
    totals = []
    with EventStorage():
        for _ in range(4):
            torch.manual_seed(0)  # the same dropout each time
            total = sum(model(inputs).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
    assert totals == sorted(totals, reverse=True) and totals[-1] < totals[0]
    predictions = model.eval().predict(inputs)
    assert predictions["pred_logits"].shape == (3, 2, 12, 10) and predictions["pred_boxes"].shape == (3, 2, 12, 4)
    detections = model(inputs)[0]["instances"]
    assert detections.image_size == (64, 96) and len(detections) > 0

    torch.save({"model": model.state_dict(), **describe_run(cfg)}, tmp_path / "model.pth")
    predictor = samdetr.load(tmp_path / "model.pth", device="cpu")
    again = predictor.model.predict(inputs)
    assert all(torch.equal(again[name], value) for name, value in predictions.items())
    assert len(predictor(np.zeros((64, 64, 3), dtype=np.uint8))) > 0


@variants
def test_recomputing_activations_and_mixed_precision_change_nothing_but_rounding(variant):
    inputs = [make_input(64, 64, TWO_BOXES, [3, 7]), make_input(64, 48)]
    model, same = (
        build_model(small_config(variant, "MODEL.SAMDETR.DROPOUT", 0.0, "MODEL.SAMDETR.ACTIVATION_CHECKPOINTING", on))
        for on in (False, True)
    )
    same.load_state_dict(model.state_dict())
    gradients = []
    for each in (model, same):
        sum(each(inputs).values()).backward()
        gradients.append([p.grad for p in each.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*gradients))
    exact = sum(model(inputs).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = sum(model(inputs).values())
    assert rough.item() == pytest.approx(exact.item(), rel=0.1)
    rough.backward()


def test_sparse_rcnn_pools_boxes_that_are_not_rounded():
    """In mixed precision, detectron2's RoIAlign rounds boxes to the type of the feature maps."""
    model = build_model(small_config("Sparse R-CNN")).eval()
    seen = []
    model.decoder.pooler.register_forward_pre_hook(lambda _, inputs: seen.append({x.dtype for x in inputs[0]}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.predict([make_input(64, 96)])
    assert seen and all(types == {torch.float32} for types in seen)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "Sparse R-CNN"])
def test_padding_is_invisible_from_the_backbone_on(variant):
    model = build_model(small_config(variant)).eval()
    torch.nn.init.normal_(model.decoder.box_head.layers[-1].weight, std=0.05)
    sizes = [(96, 128), (77, 65)]
    shapes = [model.backbone.output_shape()[name] for name in model.in_features]
    full = [torch.randn(2, s.channels, 96 // s.stride, 128 // s.stride) for s in shapes]

    def predict(features, image_sizes):
        return model.decode(model.encoder(model.feature_projection(features, image_sizes)))[0]

    together = predict(full, sizes)
    cut = [x[1:, :, : math.ceil(77 / s.stride), : math.ceil(65 / s.stride)] for x, s in zip(full, shapes)]
    alone, first = predict(cut, sizes[1:]), predict([x[:1] for x in full], sizes[:1])
    for name in ("logits", "boxes"):
        assert torch.allclose(getattr(together, name)[:, 1:], getattr(alone, name), atol=1e-5)
        assert torch.allclose(getattr(together, name)[:, :1], getattr(first, name), atol=1e-5)
        assert not torch.allclose(getattr(together, name)[:, :1], getattr(together, name)[:, 1:], atol=1e-4)


def test_sparse_rcnn_does_not_depend_on_other_images_of_the_same_size():
    model = build_model(small_config("Sparse R-CNN")).eval()
    one, other = make_input(64, 96, seed=1), make_input(64, 96, seed=2)
    alone, together = model.predict([one]), model.predict([one, other])
    assert all(torch.allclose(alone[name], together[name][:, :1], rtol=1e-3, atol=1e-3) for name in alone)
    assert not torch.allclose(alone["pred_logits"], together["pred_logits"][:, 1:], atol=0.05)


@pytest.mark.slow
@pytest.mark.thorough
def test_what_can_be_exported_computes_the_same_and_what_cannot_says_so(tmp_path):
    for variant in ("SMCA-DETR, multi-scale", "Anchor DETR", "Sparse R-CNN"):
        cfg = small_config(variant, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 1)  # the graph's size decides how long it takes
        model = build_model(cfg).eval()
        torch.save({"model": model.state_dict(), **describe_run(cfg)}, tmp_path / "model.pth")
        predictor = samdetr.load(tmp_path / "model.pth", device="cpu")
        if variant == "Sparse R-CNN":
            with pytest.raises(UserError, match="SparseRCNN cannot be exported"):
                trace(predictor, (64, 96))
            continue
        images = 255 * torch.rand(3, 3, 128, 64)  # another number of images of another size
        _, scores, _ = trace(predictor, (64, 96)).module()(images)
        for i, detections in enumerate(model([{"image": image} for image in images])):
            assert torch.allclose(detections["instances"].scores, scores[i], atol=1e-5)


@variants
def test_attention_that_cannot_be_drawn_says_so(variant):
    model = build_model(small_config(variant))
    with (
        pytest.raises(UserError, match=r"does not expose its attention weights|only that of a SAMDETR"),
        record_attention(model),
    ):
        pass


@pytest.mark.parametrize(("variant", "names"), [("SMCA-DETR", ["query", "key", "value"]), ("Anchor DETR", PROJECTIONS)])
def test_cross_attention_starts_as_attention_that_holds_its_projections_as_one(variant, names):
    """Xavier's rule then sees the output width of all of them."""
    attention = build_model(small_config(variant)).decoder.layers[0].cross_attention
    for name in names:
        projection = getattr(attention, name)
        bound = math.sqrt(6 / (32 + 32 * len(names)))
        assert 0.95 * bound < projection.weight.abs().max() <= bound and not projection.bias.any()
    assert attention.output.weight.abs().max() > math.sqrt(6 / 64) * 0.95
