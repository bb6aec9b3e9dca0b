"""samdetr.modeling.baselines.transformers_detr: against transformers' own models, and what these do wrong from scratch."""

import ast
import copy
import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

import samdetr
from helpers import BATCH, ROOT, frozen_statistics, load_config, make_input, make_step, run_steps, tiny_config
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint
from samdetr.engine import Trainer
from samdetr.errors import UserError
from samdetr.export import trace
from samdetr.modeling.structures import ImageTarget
from samdetr.visualization import record_attention

PREFIXES = {
    "detr": "Detr",
    "conditional_detr": "ConditionalDetr",
    "dab_detr": "DabDetr",
    "deformable_detr": "DeformableDetr",
}
MULTI_SCALE = [
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.SAMDETR.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.TRANSFORMERS.NUM_LEVELS", 4),
]
DETECTORS = {
    "detr": ["MODEL.TRANSFORMERS.DETECTOR", "detr"],
    "conditional_detr": ["MODEL.TRANSFORMERS.DETECTOR", "conditional_detr"],
    "dab_detr": ["MODEL.TRANSFORMERS.DETECTOR", "dab_detr", "MODEL.TRANSFORMERS.DROPOUT", 0.0],
    "dn_detr": [
        *("MODEL.TRANSFORMERS.DETECTOR", "dab_detr", "MODEL.TRANSFORMERS.DROPOUT", 0.0),
        *("MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"),
    ],
    "deformable_detr": ["MODEL.TRANSFORMERS.DETECTOR", "deformable_detr"],
    "deformable_detr_pp": ["MODEL.TRANSFORMERS.DETECTOR", "deformable_detr", *MULTI_SCALE],
}
# detectron2's ResNet-50 with the widths that the models of transformers have below.
RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.STEM_OUT_CHANNELS", 8),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.RESNETS.WIDTH_PER_GROUP", 4),
    *("MODEL.RESNETS.OUT_FEATURES", ["res5"], "MODEL.SAMDETR.IN_FEATURES", ["res5"]),
]
every = pytest.mark.parametrize("name", DETECTORS)
INPUTS = [
    make_input(64, 96, [(10, 12, 40, 50), (30, 5, 62, 33)], [3, 7]),
    make_input(80, 64, [(0, 0, 20, 20)], [1], seed=1),
]


def config(name, *options):
    return tiny_config("MODEL.META_ARCHITECTURE", "TransformersDETR", *options, *DETECTORS[name])


def start(name, *options):
    torch.manual_seed(0)
    return build_model(config(name, *options))


def test_transformers_is_imported_by_nothing_but_a_model_that_needs_it():
    for path in (ROOT / "projects" / "SAMDETR" / "samdetr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.split(".")[0] == "transformers" for name in names), path.name


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="needs a package: pip install transformers"):
        start("detr")


@every
def test_every_layer_has_losses_that_reach_every_parameter(name):
    model = start(name)
    losses = model(INPUTS)
    kinds = ("loss", "loss_dn") if name == "dn_detr" else ("loss",)
    assert set(losses) == {f"{p}_{n}{s}" for p in kinds for n in ("class", "l1", "giou") for s in ("", "_0", "_1")}
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def weights_of(model):
    """Random weights for a model of transformers, at which its outputs differ from query to query and from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    for key, value in model.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            value.copy_(drawn.abs() + 0.5)
        elif value.dim() < 2:
            value.copy_(0.3 * drawn + ("weight" in key))
        else:
            value.copy_(drawn * (1.0 if "query" in key or "level" in key else math.sqrt(2 / value[0].numel())))
    return model


def theirs(name, **options):
    """A model of transformers as it is, of the sizes of :func:`tiny_config`."""
    import transformers

    detector, multi_scale = name.removesuffix("_pp"), name.endswith("_pp")
    outputs = ["stage2", "stage3", "stage4"] if multi_scale else ["stage4"]
    options |= {"num_feature_levels": 4 if multi_scale else 1} if detector == "deformable_detr" else {}
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32, 64, 128], depths=[3, 4, 6, 3], out_features=outputs
    )
    sizes = {
        **{"encoder_layers": 1, "encoder_ffn_dim": 48, "encoder_attention_heads": 4},
        **{"decoder_layers": 3, "decoder_ffn_dim": 48, "decoder_attention_heads": 4},
        **{"num_queries": 12, "num_labels": 10, "hidden_size" if detector == "dab_detr" else "d_model": 32},
    }
    made = getattr(transformers, f"{PREFIXES[detector]}Config")(backbone_config=resnet, **sizes, **options)
    with torch.no_grad():
        return weights_of(getattr(transformers, f"{PREFIXES[detector]}ForObjectDetection")(made)).eval()


@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "dn_detr"])
def test_outputs_are_those_of_transformers_models(name, tmp_path):
    """Of a padded batch, with the weights from its state dict; its files for its hub, with other names, give the same."""
    expected_model = theirs(name)
    torch.save(expected_model.state_dict(), tmp_path / "state_dict.pth")
    model = build_model(config(name, *RESNET)).eval()
    CheckedCheckpointer(model, complete=True).load(str(tmp_path / "state_dict.pth"))
    expected_model.save_pretrained(tmp_path)
    weights = [Checkpoint.read(tmp_path / file).weights for file in ("state_dict.pth", "model.safetensors")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    pixels, mask = torch.zeros(2, 3, 80, 96), torch.zeros(2, 80, 96, dtype=torch.long)
    for i, inputs in enumerate(INPUTS):
        height, width = inputs["image"].shape[1:]
        pixels[i, :, :height, :width] = (inputs["image"] - model.pixel_mean) / model.pixel_std
        mask[i, :height, :width] = 1
    with torch.no_grad():
        expected = expected_model(pixels, pixel_mask=mask)
        without_mask = expected_model(pixels)
    found = model.predict(INPUTS)
    assert torch.allclose(found["pred_boxes"][-1], expected.pred_boxes, atol=1e-4)
    assert torch.allclose(found["pred_logits"][-1], expected.logits[..., :10], atol=1e-3)
    assert expected.pred_boxes.std(1).min() > 1e-3  # from query to query
    assert not torch.allclose(without_mask.pred_boxes, expected.pred_boxes, atol=1e-3)


@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_earlier_layers_predict_as_if_they_were_the_last_ones(name):
    """With auxiliary_loss, transformers feeds each layer's output through a norm before the next layer; the papers do not."""
    model = start(name).eval()
    expected = model.predict(INPUTS)
    layers = model.network.decoder.layers
    for number in (2, 1):
        del layers[number:]
        found = model.predict(INPUTS)
        for key, value in found.items():
            assert torch.allclose(value, expected[key][:number], atol=1e-5), key
    assert not model.network.config.auxiliary_loss


def test_the_backbone_learns_but_for_its_first_stages():
    """transformers freezes all of its own ResNet, since it looks for other names than its parameters have."""
    model = start("detr", *RESNET, "MODEL.BACKBONE.FREEZE_AT", 2)
    sum(model(INPUTS).values()).backward()
    for key, parameter in model.backbone.named_parameters():
        learns = key.startswith(("res3", "res4", "res5"))
        assert parameter.requires_grad == learns and (parameter.grad is not None) == learns, key
    assert not any(key.startswith("network.backbone") for key in model.state_dict())


@every
def test_every_class_starts_with_a_small_score(name):
    """With biases of 0, the focal loss of all queries and classes would be hundreds of times larger."""
    model = start(name)
    scores = model.predict(INPUTS)["pred_logits"].sigmoid()
    assert 0.005 < scores.mean() < 0.02
    assert sum(value for key, value in model(INPUTS).items() if "class" in key) < 30
    assert model.class_head.out_features == 10  # a sigmoid each, none for "no object"


@every
def test_weights_start_as_published(name):
    """Embeddings from N(0, 1), matrices Xavier-uniform; transformers draws all of them from N(0, 0.02)."""
    network = start(name).network
    queries = getattr(network, "query_refpoint_embeddings", None) or network.query_position_embeddings
    assert queries.weight.std().item() == pytest.approx(1, rel=0.25)
    feedforward = next(m for n, m in network.encoder.named_modules() if n.endswith("fc1"))
    assert feedforward.weight.std().item() == pytest.approx(math.sqrt(2 / (32 + 48)), rel=0.1)
    assert feedforward.bias.abs().max() > 0.05  # torch's own, and not 0
    attention = network.decoder.layers[1].self_attn
    if hasattr(attention, "q_proj"):  # three matrices in one, for Xavier's rule
        assert attention.q_proj.weight.std().item() == pytest.approx(math.sqrt(2 / (32 + 96)), rel=0.1)
    else:
        content = getattr(attention, "q_content_proj", None) or attention.self_attn_query_content_proj
        assert content.weight.std().item() == pytest.approx(math.sqrt(2 / (32 + 32)), rel=0.1)


@pytest.mark.parametrize(("name", "attentions"), [("detr", 7), ("conditional_detr", 7), ("deformable_detr", 3)])
def test_dropout_is_where_the_authors_have_it(name, attentions, monkeypatch):
    """On attention's weights and inside the feed-forward layers as well; transformers has it on the encoder's input instead."""
    model = build_model(config(name))
    F = torch.nn.functional
    dropout, attention = F.dropout, F.scaled_dot_product_attention
    of_outputs, of_weights = [], []
    monkeypatch.setattr(F, "dropout", lambda x, p, training: (of_outputs.append(p), dropout(x, p, training))[1])
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *tensors, dropout_p, **options: (of_weights.append(dropout_p), attention(*tensors, **options))[1],
    )
    model(INPUTS)
    assert of_weights == [0.1] * attentions
    assert of_outputs[0] == 0.0 and set(of_outputs[1:]) == {0.1}
    # One encoder layer: what attention puts out, and twice in the feed-forward part; in each decoder layer, one attention more.
    assert len(of_outputs) == 1 + 3 + 3 * 4


def test_deformable_detr_starts_with_points_in_eight_directions():
    model = start("deformable_detr_pp", "MODEL.SAMDETR.NUM_HEADS", 8)
    for layer in model.network.decoder.layers:
        offsets = layer.encoder_attn.sampling_offsets
        assert not offsets.weight.any() and not layer.encoder_attn.attention_weights.weight.any()
        points = offsets.bias.view(8, 4, 4, 2)  # heads, levels, points, (x, y)
        around = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
        for number in range(4):
            expected = (number + 1) * torch.tensor(around, dtype=torch.float32)[:, None]
            assert torch.allclose(points[:, :, number], expected.expand(-1, 4, -1), atol=1e-5)
    boxes = model.predict(INPUTS)["pred_boxes"]
    assert torch.allclose(boxes[..., 2:], torch.tensor(-2.0).sigmoid())
    assert model.network.level_embed.std().item() == pytest.approx(1, rel=0.3)
    assert boxes[..., :2].std() > 0.05


@pytest.mark.parametrize("name", ["dab_detr", "dn_detr"])
def test_dab_detr_starts_with_its_reference_boxes_all_over_the_image(name):
    model = start(name)
    expected = model.network.query_refpoint_embeddings.weight.sigmoid()
    assert torch.allclose(model.predict(INPUTS)["pred_boxes"], expected.expand(3, 2, -1, -1), atol=1e-5)
    assert expected.std(0).min() > 0.1


def test_denoising_queries_do_not_change_what_matching_queries_predict():
    model = frozen_statistics(start("dn_detr"))
    torch.nn.init.normal_(model.box_head.layers[-1].weight, std=0.1)
    images = model.preprocess_images(INPUTS)
    targets = [
        ImageTarget(torch.tensor([3, 7]), torch.rand(2, 4) * 0.4 + 0.3),
        ImageTarget(torch.tensor([1]), torch.full((1, 4), 0.5)),
    ]
    encoded = model.encode(images.tensor, images.image_sizes)
    with torch.no_grad():
        alone, _ = model.decode(encoded)
        together, queries = model.decode(encoded, targets)
        other, _ = model.decode(encoded, targets)  # other noise
    assert together.boxes.shape[2] == 12 + 5 * 2 and queries.denoising.valid.sum() == 5 * 3
    for found in (together, other):
        assert torch.allclose(found.of_queries(slice(12)).boxes, alone.boxes, atol=1e-5)
        assert torch.allclose(found.of_queries(slice(12)).logits, alone.logits, atol=1e-4)
    assert not torch.allclose(together.boxes[:, :, 12:], other.boxes[:, :, 12:], atol=1e-3)
    assert torch.equal(queries.content[0, :12, -1], torch.zeros(12)) and (queries.content[0, 12:, -1] == 1).all()


def test_denoising_groups_do_not_see_each_other():
    model = frozen_statistics(start("dn_detr")).eval()
    images = model.preprocess_images(INPUTS[:1])
    encoded = model.encode(images.tensor, images.image_sizes)
    target = ImageTarget(torch.tensor([3]), torch.tensor([[0.5, 0.5, 0.4, 0.4]]))
    made = model.make_queries(1, [target])

    def predict(content):
        changed = copy.copy(made)
        changed.content = content
        model.make_queries = lambda batch_size, targets: changed
        with torch.no_grad():
            return model.decode(encoded, [target])[0].logits[-1, 0]

    before = predict(made.content)
    moved = made.content.clone()
    moved[:, 12] += 1.0  # the first group
    difference = (predict(moved) - before).abs().amax(-1)
    assert difference[12] > 1e-2 and difference[[*range(12), *range(13, 17)]].max() < 1e-5


def test_accumulated_gradients_are_those_of_the_whole_batch():
    options = ["MODEL.META_ARCHITECTURE", "TransformersDETR", *DETECTORS["dab_detr"]]
    whole = frozen_statistics(start("dab_detr"))
    parts = copy.deepcopy(whole)
    run_steps(make_step(whole, BATCH, *options))
    run_steps(make_step(parts, BATCH, *options, "SOLVER.ACCUMULATION_STEPS", 2))
    for (name, a), b in zip(whole.named_parameters(), parts.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * a.grad.abs().max().clamp(min=1e-3)), name


@every
def test_bfloat16_trains_and_predicts_boxes_in_float32(name):
    model = start(name, "MODEL.TRANSFORMERS.DROPOUT", 0.0)
    torch.manual_seed(0)  # the noise of DN-DETR
    exact = sum(model(INPUTS).values()).item()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(INPUTS)
        assert {value.dtype for value in model.predict(INPUTS).values()} == {torch.float32}
    total = sum(losses.values())
    total.backward()
    assert total.item() == pytest.approx(exact, rel=0.05)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def run_config(name, folder, *options):
    return config(
        *(name, "OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 5),
        *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", ()),
        *("INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64, "SOLVER.EMA.ENABLED", True, *options),
    )


def trained(cfg, resume=False, until=None):
    seed_all_rng(None if resume else cfg.SEED)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    trainer.max_iter = until or trainer.max_iter
    trainer.train()
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)


@every
def test_trained_models_evaluate_as_they_do_when_they_are_loaded(name, tmp_path):
    model = start(name)
    run_steps(make_step(model, INPUTS), iterations=2)
    Checkpoint({"model": model.state_dict()}).write(tmp_path / "model.pth")
    expected = model.eval()(INPUTS)
    torch.manual_seed(1)
    loaded = build_model(config(name)).eval()
    CheckedCheckpointer(loaded, complete=True).load(str(tmp_path / "model.pth"))
    for a, b, inputs in zip(expected, loaded(INPUTS), INPUTS):
        a, b = a["instances"], b["instances"]
        assert len(a) == 100 and a.image_size == inputs["image"].shape[1:]
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)


@pytest.mark.parametrize("name", ["detr", "dn_detr"])  # with dropout, with noise
def test_a_run_trains_resumes_exactly_and_its_checkpoint_detects(name, tmp_path):
    expected = trained(run_config(name, tmp_path / "whole"))
    trained(run_config(name, tmp_path / "resumed"), until=1)
    found = trained(run_config(name, tmp_path / "resumed"), resume=True)
    for part in ("model", "average"):
        assert all(torch.equal(found[part][key], value) for key, value in expected[part].items()), part
    begin = torch.load(tmp_path / "resumed" / "model_0000000.pth", weights_only=True)["model"]
    assert not torch.equal(begin["class_head.weight"], expected["model"]["class_head.weight"])
    predictor = samdetr.load(tmp_path / "whole" / "model_final.pth", device="cpu")
    assert predictor.class_names == [str(digit) for digit in range(10)]
    detections = predictor(INPUTS[0]["image"].byte().permute(1, 2, 0).numpy())
    assert len(detections) == 100 and detections.pred_boxes.tensor.isfinite().all()
    assert torch.equal(predictor.model.class_head.weight, expected["average"]["module.class_head.weight"])
    with pytest.raises(UserError, match="A TransformersDETR cannot be exported here"):
        trace(predictor)
    with (
        pytest.raises(UserError, match="The attention of a TransformersDETR is not shown"),
        record_attention(predictor.model),
    ):
        pass


# All parameters, in millions: by transformers' own models of the published sizes, and in the paper's Table 1.
SIZES = {
    "detr_R_50": (41.6, 41),
    "detr_R_50_DC5": (41.6, 41),
    "conditional_detr_R_50": (43.4, 44),
    "conditional_detr_R_50_DC5": (43.4, 44),
    "dab_detr_R_50_DC5": (43.7, 44),
    "dn_detr_R_50_DC5": (43.7, 44),
    "deformable_detr_R_50": (34.1, 34),
    "deformable_detr_R_50_DC5": (34.1, 34),
    "deformable_detr_pp_R_50": (40.1, 40),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_models_are_as_large_as_the_published_ones(name):
    with torch.device("meta"):
        model = build_model(load_config(f"baselines/{name}_1x", "MODEL.DEVICE", "meta"))
    own, paper = SIZES[name]
    number = sum(p.numel() for p in model.parameters()) / 1e6
    assert number == pytest.approx(own, abs=0.06) and abs(number - paper) < 0.65
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    assert number - trainable == pytest.approx(0.22, abs=0.01)  # the stem and res2
