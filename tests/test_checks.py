"""samdetr.checks: every mistake gets an error that names it and says what to do."""

import json

import pytest
import torch
from conftest import ROOT, load_config, tiny_config, tiny_model
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import samdetr
from samdetr.checks import _check_same_classes, check_config, check_loaded, check_weights_file, merge_options
from samdetr.errors import UserError


def new_config():
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    return cfg


DIGITS = str(ROOT / "configs" / "sam_detr_digits.yaml")


@pytest.mark.parametrize(
    ("config_file", "options", "message"),
    [
        ("nowhere.yaml", [], r"--config-file nowhere\.yaml: there is no such file"),
        (
            DIGITS,
            ["MODEL.SAMDETR.NUM_QUERY", "5"],
            r"no config key MODEL\.SAMDETR\.NUM_QUERY.*'MODEL\.SAMDETR\.NUM_QUERIES'",
        ),
        (DIGITS, ["MODEL.SAMDETR.NUM_QUERIES"], "pairs KEY VALUE"),
        (DIGITS, ["MODEL.SAMDETR.NUM_QUERIES", "many"], r"NUM_QUERIES"),
    ],
)
def test_config_files_and_options(config_file, options, message):
    with pytest.raises(UserError, match=message):
        merge_options(new_config(), config_file, options)


def test_a_key_that_does_not_exist_in_a_file(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f'_BASE_: "{DIGITS}"\nMODEL:\n  SAMDETR:\n    ALIGNER:\n      POOL_SIZE: 3\n')
    with pytest.raises(
        UserError, match=r"typo\.yaml: there is no config key MODEL\.SAMDETR\.ALIGNER\.POOL_SIZE.*POOLED_SIZE"
    ):
        merge_options(new_config(), str(path), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "SAMDTR"], r"META_ARCHITECTURE is 'SAMDTR'.*RetinaNet.*mean 'SAMDETR'"),
        (["MODEL.BACKBONE.NAME", "resnet"], r"BACKBONE\.NAME is 'resnet'.*build_resnet_dc5_backbone"),
        (
            ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "SMCA"],
            r"CROSS_ATTENTION\.NAME is 'SMCA', which is not registered; there are: .*SMCACrossAttention",
        ),
        (["MODEL.SAMDETR.ALIGNER.NAME", "X"], r"ALIGNER\.NAME is 'X'.*IdentityAligner, SemanticsAligner"),
        (["MODEL.SAMDETR.ENCODER.NAME", "X"], r"ENCODER\.NAME is 'X'.*DeformableTransformerEncoder"),
        (["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "X"], r"QUERY_GENERATOR\.NAME is 'X'.*DenoisingQueryGenerator"),
        (["MODEL.SAMDETR.NUM_HEADS", 5], r"HIDDEN_DIM \(32\) is not divisible by MODEL\.SAMDETR\.NUM_HEADS \(5\)"),
        (["MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 7], r"HIDDEN_DIM \(32\) is not divisible by .*NUM_GROUPS \(7\)"),
        (["MODEL.SAMDETR.NUM_QUERIES", 0], r"NUM_QUERIES is 0: it must be at least 1"),
        (["MODEL.SAMDETR.ALIGNER.NUM_KEYPOINTS", -1], r"NUM_KEYPOINTS is -1: it must be at least 0"),
        (["MODEL.SAMDETR.CROSS_ATTENTION.NUM_POINTS", 0], r"CROSS_ATTENTION\.NUM_POINTS is 0"),
        (["SOLVER.OPTIMIZER", "Adam"], r"SOLVER\.OPTIMIZER is 'Adam': choose from 'AdamW', 'SGD'"),
        (
            ["MODEL.SAMDETR.NUM_CLASSES", 80],
            r"NUM_CLASSES is 80, but 'digits_train'.*10 classes.*set MODEL\.SAMDETR\.NUM_CLASSES 10",
        ),
        (["DATASETS.TRAIN", ("digit_train",)], r"DATASETS\.TRAIN names 'digit_train'.*mean 'digits_train'"),
        (["DATASETS.TRAIN", ()], r"DATASETS\.TRAIN is empty"),
        (
            ["DATASETS.TRAIN", ("coco_2017_train",)],
            r"coco_2017_train.*instances_train2017\.json does not exist.*DETECTRON2_DATASETS, now",
        ),
        (["MODEL.SAMDETR.ALIGNER.REDUCTION", 0], r"ALIGNER\.REDUCTION is 0: it must be at least 1"),
        (["SOLVER.NON_FINITE", "ignore"], r"NON_FINITE is 'ignore': choose from 'stop', 'skip'"),
        (["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"], r"'float16' needs CUDA: use 'bfloat16'"),
        (["SOLVER.ACCUMULATION_STEPS", 17], r"ACCUMULATION_STEPS is 17: it must be between 1 and .*\(16\)"),
        (["SOLVER.EMA.DECAY", 1.0], r"EMA\.DECAY is 1\.0: it must be in \[0, 1\)"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], r"SAMPLER_TRAIN is 'RepeatFactor"),
        (["MODEL.WEIGHTS", "missing.pth"], r"MODEL\.WEIGHTS missing\.pth: there is no such file"),
    ],
)
def test_configs(options, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(*options), training=True)


def test_datasets_must_agree_on_their_classes(shapes_root, tmp_path):
    data = json.loads((shapes_root / "annotations.json").read_text())
    data["categories"] = [{"id": 1, "name": "red"}, {"id": 2, "name": "green"}]
    (tmp_path / "swapped.json").write_text(json.dumps(data))
    entries = [["in_order", str(shapes_root / "annotations.json"), str(shapes_root)]]
    entries += [["swapped", str(tmp_path / "swapped.json"), str(shapes_root)]]
    options = ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", ("in_order",), "DATASETS.TEST", ("swapped",)]
    with pytest.raises(UserError, match=r"'in_order' and 'swapped' have different classes.*number 0 is 'green'.*'red'"):
        check_config(tiny_config(*options, "MODEL.SAMDETR.NUM_CLASSES", 2), training=True)


def test_datasets_with_other_numbers_of_classes_are_named():
    """Also for meta-architectures of which this project does not know where their number of classes stands."""
    MetadataCatalog.get("two").thing_classes = ["a", "b"]
    MetadataCatalog.get("three").thing_classes = ["a", "b", "c"]
    with pytest.raises(UserError, match=r"number 2 is None in the first and 'c' in the second"):
        _check_same_classes(["two", "three"])


@pytest.mark.parametrize(
    ("config", "key"), [("faster_rcnn", "MODEL.ROI_HEADS.NUM_CLASSES"), ("fcos", "MODEL.RETINANET.NUM_CLASSES")]
)
def test_detectron2s_detectors_need_the_datasets_number_of_classes(config, key):
    check_config(load_config(f"experiments/{config}"), training=True)
    with pytest.raises(UserError, match=rf"{key} is 7, but 'digits_train' .*set {key} 10"):
        check_config(load_config(f"experiments/{config}", key, 7), training=True)


@pytest.mark.parametrize("config", ["faster_rcnn", "cascade_rcnn", "retinanet", "fcos"])
def test_detectron2s_detectors_can_be_tuned_to_other_classes(config):
    key = "ROI_HEADS" if "rcnn" in config else "RETINANET"
    trained = build_model(load_config(f"experiments/{config}"))
    model = build_model(load_config(f"experiments/{config}", f"MODEL.{key}.NUM_CLASSES", 3))
    check_loaded("a.pth", model, trained.state_dict(), complete=False)
    with pytest.raises(UserError, match="another architecture"):
        check_loaded("a.pth", model, trained.state_dict(), complete=True)


def test_precision_is_checked_for_evaluation_too():
    with pytest.raises(UserError, match=r"PRECISION is 'fp16': choose from 'bfloat16', 'float16'"):
        check_config(tiny_config("SOLVER.AMP.PRECISION", "fp16"), training=False)


def test_a_good_config_passes():
    check_config(tiny_config(), training=True)
    check_config(tiny_config("DATASETS.TRAIN", ("no such dataset",)), training=False)


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": tiny_model().state_dict()}, path)
    check_weights_file(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged or not a checkpoint"):
        check_weights_file(str(path))
    path.write_text("this is not a checkpoint")
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged or not a checkpoint") as caught:
        check_weights_file(str(path))
    assert "\n" not in str(caught.value)


def test_checkpoints_with_other_objects_say_how_to_go_on(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": {}, "args": UserError("an object")}, path)
    with pytest.raises(UserError, match=r"holds Python objects.*weights_only=False.*\"model\" entry"):
        check_weights_file(str(path))


def test_checkpoints_of_another_architecture():
    model = tiny_model()
    other = tiny_model("MODEL.SAMDETR.HIDDEN_DIM", 16).state_dict()
    with pytest.raises(UserError, match="of another architecture"):  # its backbone fits, the rest does not
        check_loaded("w.pth", model, other, complete=False)
    with pytest.raises(UserError, match=r"beside tensors it has the entries state_dict, epoch.*convert_checkpoint"):
        check_loaded("w.pth", model, {"state_dict": {}, "epoch": 1}, complete=False)
    with pytest.raises(UserError, match=r"w\.pth is of another architecture.*of shape .* has shape"):
        check_loaded("w.pth", model, other, complete=True)
    with pytest.raises(UserError, match=r"w\.pth has no parameter that fits.*'foo'"):
        check_loaded("w.pth", model, {"foo": torch.zeros(1)}, complete=False)
    check_loaded("w.pth", model, model.state_dict(), complete=True)
    check_loaded("w.pth", model, model.backbone.state_dict(prefix="backbone."), complete=False)
