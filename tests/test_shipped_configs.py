"""The YAML files in configs/ and in tools/experiments/: they build, train and evaluate."""

import re

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

import samdetr
from helpers import ROOT, load_config, load_experiment, make_input
from samdetr.checkpoint import CheckedCheckpointer
from samdetr.checks import check_model
from samdetr.solver import build_optimizer

FAMILIES = [
    *("sam_detr_R_50", "sam_detr_smca_R_50"),
    *("sam_detr_R_50_DC5", "sam_detr_smca_R_50_DC5", "sam_detr_dn_R_50_DC5", "sam_detr_smca_dn_R_50_DC5"),
    *("sam_detr_pp_R_50", "sam_detr_pp_smca_R_50", "sam_detr_pp_smca_dn_R_50"),
]


COCO_CONFIGS = [f"{family}_{schedule}" for family in FAMILIES for schedule in ("1x", "50ep")]


PLUS_CONFIGS = ["sam_detr_plus_R_50_1x", "sam_detr_plus_R_50_50ep"]


DETECTRON2_BASELINES = [
    *("faster_rcnn_R_50_C4", "faster_rcnn_R_50_DC5", "faster_rcnn_R_50_FPN", "cascade_rcnn_R_50_FPN"),
    *("retinanet_R_50_FPN", "fcos_R_50_FPN"),
]


TRANSFORMERS_BASELINES = [
    *("detr_R_50", "conditional_detr_R_50", "deformable_detr_R_50", "detr_R_50_DC5", "conditional_detr_R_50_DC5"),
    *("deformable_detr_R_50_DC5", "dab_detr_R_50_DC5", "dn_detr_R_50_DC5", "deformable_detr_pp_R_50"),
]


ABLATIONS = [
    *("multi_head_R_50", "conditional_R_50", "smca_multi_head_R_50", "deformable_R_50"),
    *("multi_head_R_50_DC5", "conditional_R_50_DC5", "smca_multi_head_R_50_DC5", "deformable_R_50_DC5"),
    *("conditional_refined_R_50_DC5", "conditional_refined_dn_R_50_DC5"),
    *("smca_multi_head_pp_R_50", "deformable_pp_R_50"),
]


OTHER_DETECTORS = [
    *("smca_detr_R_50", "smca_detr_R_50_DC5", "smca_detr_pp_R_50", "anchor_detr_R_50_DC5", "sparse_rcnn_R_50_FPN"),
]


EXPERIMENT_CONFIGS = ROOT / "tools" / "experiments" / "configs"
EXPERIMENTS = sorted(
    str(path.relative_to(EXPERIMENT_CONFIGS).with_suffix(""))
    for path in EXPERIMENT_CONFIGS.rglob("*.yaml")
    if path.stem != "Base-Experiment" and path.parent.name != "bccd"
)


BCCD = [
    "sam_detr_plus_bccd",
    "sam_detr_plus_one_level_bccd",
    "sam_detr_smca_bccd",
    "detr_baseline_bccd",
    "faster_rcnn_bccd",
]


def test_every_config_is_known():
    found = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    others = {
        "Base-SAMDETR",
        "Base-SAMDETR-DC5",
        "Base-SAMDETR-pp",
        "Base-fine-tuning",
        "sam_detr_digits",
        "sam_detr_pp_digits",
        "sam_detr_plus_digits",
    }
    assert found == {*COCO_CONFIGS, *PLUS_CONFIGS} | others
    bccd = {path.stem for path in (ROOT / "configs" / "bccd").glob("*.yaml")}
    assert bccd == {"Base-BCCD", *BCCD}
    baselines = {path.stem for path in (ROOT / "configs" / "baselines").glob("*.yaml")} - {"Base-Detectron2"}
    assert baselines == {f"{name}_1x" for name in (*DETECTRON2_BASELINES, *TRANSFORMERS_BASELINES, *OTHER_DETECTORS)}
    ablations = {path.stem for path in (ROOT / "configs" / "ablations").glob("*.yaml")}
    assert ablations == {f"{name}_1x" for name in ABLATIONS}


@pytest.mark.parametrize("name", [name for name in DETECTRON2_BASELINES if not name.startswith("fcos")])
def test_detectron2s_detectors_are_configured_as_in_its_model_zoo(name):
    """Key by key, but for what only this project adds."""
    from detectron2 import model_zoo

    folder, theirs = "COCO-Detection", f"{name}_1x"
    if name.startswith("cascade"):
        folder, theirs = "Misc", "cascade_mask_rcnn_R_50_FPN_1x"
    expected = model_zoo.get_config(f"{folder}/{theirs}.yaml")
    found = load_config(f"baselines/{name}_1x", "MODEL.DEVICE", expected.MODEL.DEVICE)

    def compare(a, b, path=""):
        for key, value in a.items():
            if isinstance(value, dict):
                compare(value, b[key], f"{path}{key}.")
            elif key == "SIZES":
                assert np.allclose(value, b[key], rtol=2e-3), path + key
            else:
                assert list(value) == list(b[key]) if isinstance(value, (list, tuple)) else value == b[key], path + key

    for node in (expected, found):
        node.defrost()
        node.OUTPUT_DIR = node.TEST.EVAL_PERIOD = node.MODEL.MASK_ON = None
        node.MODEL.ROI_MASK_HEAD.clear()
    compare(expected, found)


def test_fcos_is_detectron2s():
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    config = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
    cfg = load_config("baselines/fcos_R_50_FPN_1x")
    ours, theirs = build_model(cfg), instantiate(config.model)
    assert str(ours) == str(theirs)
    shapes = {name: (p.shape, p.requires_grad) for name, p in ours.named_parameters()}
    assert shapes == {name: (p.shape, p.requires_grad) for name, p in theirs.named_parameters()}
    for key in (
        "num_classes",
        "center_sampling_radius",
        "focal_loss_alpha",
        "focal_loss_gamma",
        "max_detections_per_image",
    ):
        assert getattr(ours, key) == getattr(theirs, key)
    for key in ("test_score_thresh", "test_topk_candidates", "test_nms_thresh", "head_in_features"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert torch.equal(ours.pixel_mean, theirs.pixel_mean) and config.optimizer.lr == cfg.SOLVER.BASE_LR


FEW = ["MODEL.SAMDETR.NUM_QUERIES", 20]  # for speed
SLOWEST_BASELINES = ("faster_rcnn_R_50_C4", "faster_rcnn_R_50_DC5", "sparse_rcnn_R_50_FPN")


def train_two_steps(cfg, label=7):
    """Train, check that something has been learned, evaluate; return the model and the optimizer."""
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    inputs = [make_input(64, 96, [(5, 5, 40, 50)], [label]), make_input(80, 64)]
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    with EventStorage():
        for _ in range(2):
            losses = model(inputs)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    assert all(loss.isfinite() for loss in losses.values())
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert "instances" in model.eval()(inputs)[0]
    return model, optimizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(f"baselines/{name}", marks=[pytest.mark.thorough] if name in SLOWEST_BASELINES else [])
            for name in (*DETECTRON2_BASELINES, "deformable_detr_R_50", *OTHER_DETECTORS)
        ),
        "ablations/deformable_R_50",
    ],
)
def test_baselines_train_and_evaluate(name):
    # Without pretrained weights, frozen norms would let the activations grow from block to block.
    options = ["MODEL.RESNETS.NORM", "BN", "SOLVER.BASE_LR", 1e-4]
    options += [] if "anchor" in name else FEW
    options += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16, "MODEL.RPN.POST_NMS_TOPK_TEST", 16]
    _, optimizer = train_two_steps(load_config(f"{name}_1x", *options))
    assert isinstance(optimizer, torch.optim.SGD) == (name.removeprefix("baselines/") in DETECTRON2_BASELINES)


@pytest.mark.parametrize("name", TRANSFORMERS_BASELINES)
def test_the_models_of_transformers_are_trained_as_sam_detr(name):
    cfg, base = load_config(f"baselines/{name}_1x"), load_config(f"sam_detr_{name[name.index('R_50') :]}_1x")
    assert cfg.MODEL.META_ARCHITECTURE == "TransformersDETR" and f"output/{name}_1x" == cfg.OUTPUT_DIR
    detector = name[: name.index("detr") + 4].replace("dn_detr", "dab_detr")
    assert detector == cfg.MODEL.TRANSFORMERS.DETECTOR
    assert cfg.SOLVER == base.SOLVER and cfg.INPUT == base.INPUT and cfg.DATASETS == base.DATASETS
    loss = base.MODEL.SAMDETR.LOSS
    if detector == "dab_detr":  # as published
        loss.CLASS_WEIGHT = 1.0
    assert loss == cfg.MODEL.SAMDETR.LOSS and cfg.MODEL.SAMDETR.MATCHER == base.MODEL.SAMDETR.MATCHER
    assert cfg.MODEL.SAMDETR.NUM_QUERIES == 300 and cfg.MODEL.WEIGHTS == base.MODEL.WEIGHTS
    check_model(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("name", BCCD)
def test_bccd_models_train_and_evaluate(name):
    cfg = load_config(f"bccd/{name}")
    model, _ = train_two_steps(cfg, label=2)
    network = model.backbone.network if "detr" in name else model.backbone.bottom_up.network
    assert not network.conv_stem.weight.requires_grad and network.blocks[6][0].conv_pwl.weight.requires_grad
    assert [[f"bccd_{split}", "BCCD", split] for split in ("train", "val", "test")] == cfg.DATASETS.VOC_FORMAT


def test_only_sam_detr_plus_on_blood_cells_has_what_the_paper_has_not():
    short = load_experiment("bccd/one_level")
    for cfg in (*(load_config(f"bccd/{name}") for name in ("sam_detr_smca_bccd", "detr_baseline_bccd")), short):
        assert not cfg.MODEL.SAMDETR.RELATIVE_OFFSETS and not cfg.MODEL.SAMDETR.ALIGNER.POOLED_CONTENT
    assert short.MODEL.SAMDETR.IN_FEATURES == ["stride16"] and not short.SOLVER.EMA.ENABLED
    for name in BCCD:
        assert load_config(f"bccd/{name}").SOLVER.EMA.ENABLED


def check_reloading(model, cfg, folder):
    """Check that a model that was saved, and loaded into another one, detects the same."""
    CheckedCheckpointer(model, str(folder), complete=True).save("model")
    loaded = build_model(cfg)
    CheckedCheckpointer(loaded, complete=True).load(str(folder / "model.pth"))
    with torch.no_grad():
        expected, found = (each.eval()([make_input(64, 80)])[0]["instances"] for each in (model, loaded))
    assert len(expected) > 0
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_classes, expected.pred_classes)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)


def test_the_demo_is_the_sam_detr_plus_of_the_experiment():
    demo, experiment = load_config("sam_detr_plus_digits"), load_experiment("sam_detr_plus")
    for cfg in (demo, experiment):  # what has no effect on the weights
        cfg.SOLVER.CHECKPOINT_PERIOD = cfg.TEST.EVAL_PERIOD = cfg.TEST.IMS_PER_BATCH = cfg.DATALOADER.NUM_WORKERS = 0
        cfg.OUTPUT_DIR = ""
    assert demo == experiment


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_differ_in_the_model_and_what_their_configs_say(name, tmp_path):
    cfg = load_experiment(name)
    base = load_experiment("Base-Experiment")
    own_rate = name.endswith("_tuned") or name == "sam_detr_plus"
    for key in ("MAX_ITER", "STEPS", *["BASE_LR"] * own_rate):
        cfg.SOLVER[key] = base.SOLVER[key]
    cfg.TEST.EVAL_PERIOD = base.TEST.EVAL_PERIOD
    assert cfg.SOLVER == base.SOLVER and cfg.TEST == base.TEST
    assert cfg.INPUT == base.INPUT and cfg.DATASETS == base.DATASETS and cfg.DATALOADER == base.DATALOADER
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    model, _ = train_two_steps(cfg)
    check_reloading(model, cfg, tmp_path)


@pytest.mark.parametrize("name", COCO_CONFIGS)
def test_schedule_and_architecture_follow_from_the_name(name):
    cfg = load_config(name)
    node = cfg.MODEL.SAMDETR
    images = cfg.SOLVER.IMS_PER_BATCH
    assert images == (8 if "DC5" in name else 16)
    epochs = 50 if "50ep" in name else 12
    assert cfg.SOLVER.MAX_ITER * images / 118287 == pytest.approx(epochs, rel=0.02)
    assert cfg.SOLVER.STEPS[0] * images / 118287 == pytest.approx(40 if epochs == 50 else 10, rel=0.02)
    assert cfg.TEST.EVAL_PERIOD * images / 118287 == pytest.approx(1, rel=0.02)
    assert (node.CROSS_ATTENTION.NAME == "SMCACrossAttention") == ("smca" in name)
    assert (node.QUERY_GENERATOR.NAME == "DenoisingQueryGenerator") == ("_dn_" in name)
    assert (len(node.IN_FEATURES) == 3) == ("_pp_" in name)
    assert (node.PROJECTION_NUM_GROUPS == 0) == (epochs == 50 and "_pp_" not in name)
    assert f"output/{name}" == cfg.OUTPUT_DIR


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "tools" / "experiments" / "configs").glob("*.yaml")]),
    ids=lambda path: path.stem,
)
def test_leaves_hold_only_differences(path):
    """No leaf repeats a value that it would inherit anyway."""
    content = yaml.safe_load(path.read_text())
    if "_BASE_" not in content:
        return
    base = samdetr.load_config(path.parent / content.pop("_BASE_"))

    def check(node, inherited, key):
        for name, value in node.items():
            if isinstance(value, dict):
                check(value, inherited[name], f"{key}{name}.")
            else:
                if isinstance(inherited[name], tuple):
                    value = tuple(yaml.safe_load(value.replace("(", "[").replace(",)", "]").replace(")", "]")))
                assert value != inherited[name], f"{path.name} repeats {key}{name}"

    check(content, base, "")


TRAINABLE = {"R_50": 58.05e6, "DC5": 58.05e6, "pp": 54.95e6}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"{family}_1x" for family in FAMILIES), "sam_detr_smca_R_50_50ep"])
def test_every_coco_model_trains_and_evaluates(name):
    """The others differ from these in the schedule."""
    train_two_steps(load_config(name, *FEW))


@pytest.mark.parametrize("name", COCO_CONFIGS)
def test_every_coco_config_builds_a_model_of_the_right_size(name):
    with torch.device("meta"):
        model = build_model(load_config(name, "MODEL.DEVICE", "meta"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = TRAINABLE["pp" if "_pp_" in name else "DC5" if "DC5" in name else "R_50"]
    expected += 0.05e6 * ("smca" in name) + 81 * 255 * ("_dn_" in name)
    assert abs(trainable - expected) < 0.05e6


@pytest.mark.slow
def test_the_plus_model_trains_and_evaluates():
    model, _ = train_two_steps(load_config(PLUS_CONFIGS[0], *FEW))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pixel_head = (256 + 1) * (3 * 256 + 80 + 4) + 2 * 256
    assert trainable == pytest.approx(TRAINABLE["pp"] + 0.05e6 + 81 * 255 + 2 * pixel_head, abs=0.05e6)


def test_the_plus_models_are_those_of_the_paper_and_what_goes_beyond():
    for name in PLUS_CONFIGS:
        cfg, base = load_config(name), load_config(name.replace("plus", "pp_smca_dn"))
        node = cfg.MODEL.SAMDETR
        node.QUERY_GENERATOR.SELECT_FROM_ENCODER = node.QUERY_GENERATOR.DN_NEGATIVES = False
        node.DECODER.LOOK_FORWARD_TWICE = node.DENSE_HEAD.ENABLED = False
        cfg.OUTPUT_DIR = base.OUTPUT_DIR
        assert cfg == base


def test_readme_names_existing_configs():
    text = (ROOT / "README.md").read_text()
    families = re.findall(r"^\| `(sam_detr\w+)` \|", text, flags=re.MULTILINE)
    assert families == FAMILIES
    named = re.findall(r"--config-file (sam_detr\w+)|_BASE_: \"([\w-]+)\.yaml\"", text)
    assert len(named) >= 3
    for name in (*(f"{family}_{schedule}" for family in families for schedule in ("1x", "50ep")), *map("".join, named)):
        assert (ROOT / "configs" / f"{name}.yaml").is_file(), name
