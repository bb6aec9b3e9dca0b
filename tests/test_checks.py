"""samdetr.checks: every mistake gets an error that names it and says what to do."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from helpers import load_experiment, tiny_config
from samdetr.checks import check_config, ignored_keys
from samdetr.data import register_datasets
from samdetr.errors import UserError

TRANSFORMERS = ["MODEL.META_ARCHITECTURE", "TransformersDETR", "MODEL.TRANSFORMERS.DETECTOR"]


ODD_WIDTH = [
    *("MODEL.SAMDETR.HIDDEN_DIM", 34, "MODEL.SAMDETR.NUM_HEADS", 2),
    *("MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 2, "MODEL.SAMDETR.ALIGNER.REDUCTION", 2),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["MODEL.META_ARCHITECTURE", "SAMDTR"], r"META_ARCHITECTURE is 'SAMDTR'.*RetinaNet.*mean 'SAMDETR'"),
        (["MODEL.BACKBONE.NAME", "resnet"], r"BACKBONE\.NAME is 'resnet'.*build_resnet_dc5_backbone"),
        (
            ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "SMCA"],
            r"CROSS_ATTENTION\.NAME is 'SMCA', which is not registered; there are: .*SMCACrossAttention",
        ),
        (
            ["MODEL.SAMDETR.QUERY_GENERATOR.CONTENT_FROM_ENCODER", True],
            r"CONTENT_FROM_ENCODER is True, which has no effect while .*SELECT_FROM_ENCODER is False: set that to True",
        ),
        (["MODEL.SAMDETR.ALIGNER.NAME", "X"], r"ALIGNER\.NAME is 'X'.*IdentityAligner, SemanticsAligner"),
        (["MODEL.SAMDETR.ENCODER.NAME", "X"], r"ENCODER\.NAME is 'X'.*DeformableTransformerEncoder"),
        (["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "X"], r"QUERY_GENERATOR\.NAME is 'X'.*DenoisingQueryGenerator"),
        (
            [option for name in ("CLASS", "L1", "GIOU") for option in (f"MODEL.SAMDETR.LOSS.{name}_WEIGHT", 0.0)],
            r"All weights in MODEL\.SAMDETR\.LOSS are 0",
        ),
        (
            ["TEST.EXPECTED_RESULTS", [["box", "AP", 50.0, 0.1]]],
            r"has the entry .*: each is \['bbox', metric, value, tolerance\]",
        ),
        (
            ["TEST.EXPECTED_RESULTS", [["bbox", "AP", 50.0, 0.1]], "DATASETS.TEST", ("digits_val", "digits_val_20")],
            r"EXPECTED_RESULTS is for one dataset, but DATASETS\.TEST names several",
        ),
        (["MODEL.SAMDETR.NUM_HEADS", 5], r"HIDDEN_DIM \(32\) is not divisible by MODEL\.SAMDETR\.NUM_HEADS \(5\)"),
        (["MODEL.SAMDETR.LOSS.FOCAL_GAMMA", 0.5], r"FOCAL_GAMMA is 0\.5, between 0 and 1, where the loss has infinite"),
        (
            [
                *("MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"),
                *(
                    "MODEL.SAMDETR.QUERY_GENERATOR.DN_NEGATIVES",
                    True,
                    "MODEL.SAMDETR.QUERY_GENERATOR.DN_BOX_NOISE",
                    0.0,
                ),
            ],
            r"DN_NEGATIVES needs noise .* but DN_BOX_NOISE is 0: raise it",
        ),
        (["MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 7], r"HIDDEN_DIM \(32\) is not divisible by .*NUM_GROUPS \(7\)"),
        (["MODEL.SAMDETR.ALIGNER.REDUCTION", 5], r"HIDDEN_DIM \(32\) is not divisible by .*ALIGNER\.REDUCTION \(5\)"),
        (["MODEL.SAMDETR.ALIGNER.NUM_KEYPOINTS", 3], r"NUM_HEADS \(4\) is not divisible by .*NUM_KEYPOINTS \(3\)"),
        (
            ODD_WIDTH,
            r"HIDDEN_DIM is 34: it must be a multiple of 4",
        ),
        ([*TRANSFORMERS, "detr_"], r"TRANSFORMERS\.DETECTOR is 'detr_': choose from 'detr', .*mean 'detr'"),
        (
            [*TRANSFORMERS, "dab_detr", "MODEL.TRANSFORMERS.NUM_LEVELS", 2],
            r"IN_FEATURES has 1 maps and MODEL\.TRANSFORMERS\.NUM_LEVELS is 2, but dab_detr has one level",
        ),
        (
            [*TRANSFORMERS, "deformable_detr", "MODEL.SAMDETR.IN_FEATURES", ["res3", "res4"]],
            r"NUM_LEVELS is 1, less than the 2 maps of MODEL\.SAMDETR\.IN_FEATURES",
        ),
        (
            [*TRANSFORMERS, "deformable_detr", "MODEL.SAMDETR.HIDDEN_DIM", 48],
            r"HIDDEN_DIM is 48: deformable_detr needs a multiple of 32",
        ),
        (
            [*TRANSFORMERS, "detr", "MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"],
            r"QUERY_GENERATOR\.NAME is 'DenoisingQueryGenerator', which detr does not have",
        ),
        (
            [*TRANSFORMERS, "detr", "MODEL.SAMDETR.DENSE_HEAD.ENABLED", True],
            r"DENSE_HEAD\.ENABLED is True, which has no effect here: set it to False",
        ),
        (
            ["MODEL.SAMDETR.QUERY_GENERATOR.DN_NEGATIVES", True],
            r"DN_NEGATIVES is True, .*NAME is 'LearnedQueryGenerator': set that to 'DenoisingQueryGenerator'",
        ),
        (
            ["MODEL.SAMDETR.DECODER.LOOK_FORWARD_TWICE", True, "MODEL.SAMDETR.DECODER.BOX_REFINEMENT", False],
            r"LOOK_FORWARD_TWICE is True, which has no effect while .*BOX_REFINEMENT is False",
        ),
        (
            ["MODEL.SAMDETR.ALIGNER.POOLED_CONTENT", True, "MODEL.SAMDETR.ALIGNER.NAME", "IdentityAligner"],
            r"POOLED_CONTENT is True, which has no effect while .*: set that to 'SemanticsAligner'",
        ),
        (
            [*TRANSFORMERS, "detr", "MODEL.SAMDETR.RELATIVE_OFFSETS", True],
            r"RELATIVE_OFFSETS is True, which has no effect here: set it to False",
        ),
        (["MODEL.SAMDETR.DROPOUT", 0.1], r"SAMDETR\.DROPOUT is 0\.1, which has no effect here: set it to 0\.0"),
        (
            ["MODEL.META_ARCHITECTURE", "AnchorDETR", "MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"],
            r"QUERY_GENERATOR\.NAME is 'DenoisingQueryGenerator', which has no effect here: set it to 'LearnedQueryGenerator'",
        ),
        ([*TRANSFORMERS, "detr", "MODEL.SAMDETR.NUM_CLASSES", 80], r"NUM_CLASSES is 80, but 'digits_train'"),
        ([*TRANSFORMERS, "detr", "MODEL.TRANSFORMERS.DROPOUT", 1.5], r"TRANSFORMERS\.DROPOUT is 1\.5: it must be"),
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
        (
            ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]],
            r"DEFORM_ON_PER_STAGE .* cannot train on the CPU: set MODEL\.DEVICE cuda, or DEFORM_ON_PER_STAGE \[False",
        ),
        (["SOLVER.ACCUMULATION_STEPS", 17], r"ACCUMULATION_STEPS is 17: it must be between 1 and .*\(16\)"),
        (["SOLVER.PATIENCE", 3, "TEST.EVAL_PERIOD", 0], r"PATIENCE is 3, but nothing is evaluated during training"),
        (["SOLVER.EMA.DECAY", 1.0], r"EMA\.DECAY is 1\.0: it must be at least 0 and at most 0\.999"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], r"SAMPLER_TRAIN is 'RepeatFactor"),
        (["MODEL.PIXEL_MEAN", ["a", "b", "c"]], r"PIXEL_MEAN is \['a', 'b', 'c'\]: it must be at least"),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", 3],
            r"IMS_PER_BATCH \(16\) is not divisible by SOLVER\.REFERENCE_WORLD_SIZE \(3\)",
        ),
        (["DATASETS.TRAIN", (1,)], r"DATASETS\.TRAIN is \(1,\): it must be names"),
        (["DATASETS.TEST", ("digits_val",) * 2], r"DATASETS\.TEST .*name each dataset once"),
        (["OUTPUT_DIR", ""], r"OUTPUT_DIR is '': name a folder"),
        (["OUTPUT_DIR", "~/run"], r"OUTPUT_DIR is .~/run.: write ./"),
        (["MODEL.MASK_ON", True], r"MODEL\.MASK_ON is True, which has no effect here: set it to False"),
        (["VIS_PERIOD", 10], r"VIS_PERIOD is 10, which has no effect here: set it to 0"),
        (["TEST.AUG.ENABLED", True], r"TEST\.AUG\.ENABLED is True"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0], r"CLIP_VALUE is 0\.0: it must be more than 0"),
        (["SOLVER.GAMMA", -1.0], r"GAMMA is -1\.0: it must be more than 0"),
        (["MODEL.SAMDETR.LOSS.L1_WEIGHT", -1.0], r"L1_WEIGHT is -1\.0: it must be at least 0"),
        (["MODEL.SAMDETR.QUERY_GENERATOR.DN_GROUPS", 0], r"DN_GROUPS is 0: it must be at least 1"),
        (["TEST.DETECTIONS_PER_IMAGE", 0], r"DETECTIONS_PER_IMAGE is 0: it must be at least 1"),
        (["MODEL.WEIGHTS", "missing.pth"], r"MODEL\.WEIGHTS missing\.pth: there is no such file"),
    ],
)
def test_configs(options, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(*options), training=True)


def classes_config(shapes_root, tmp_path, **names):
    """A config of two datasets, the second with other class names by their ids."""
    data = json.loads((shapes_root / "annotations.json").read_text())
    data["categories"] = [{"id": int(key[-1]), "name": name} for key, name in names.items()]
    (tmp_path / "other.json").write_text(json.dumps(data))
    first, second = f"first_{tmp_path.name}", f"second_{tmp_path.name}"
    entries = [[first, str(shapes_root / "annotations.json"), str(shapes_root)]]
    entries += [[second, str(tmp_path / "other.json"), str(shapes_root)]]
    options = ["DATASETS.COCO_FORMAT", entries, "DATASETS.TRAIN", (first,), "DATASETS.TEST", (second,)]
    cfg = tiny_config(*options, "MODEL.SAMDETR.NUM_CLASSES", 2)
    register_datasets(cfg)
    return cfg


def test_datasets_have_the_same_classes_in_any_order(shapes_root, tmp_path):
    check_config(classes_config(shapes_root, tmp_path, class1="red", class2="green"), training=True)


def test_datasets_of_other_classes_are_refused(shapes_root, tmp_path):
    cfg = classes_config(shapes_root, tmp_path, class1="green", class2="blue")
    message = r"'second_.*' does not fit 'first_.*': of its 2 classes, it alone has 'blue', and lacks 'red'.*same names"
    with pytest.raises(UserError, match=message):
        check_config(cfg, training=True)


def test_a_checkpoint_of_other_classes_is_not_evaluated(shapes_root, tmp_path):
    cfg = classes_config(shapes_root, tmp_path, class1="red", class2="green")
    for names, fits in ((["green", "red"], True), (["green", "blue"], False)):
        torch.save({"model": {}, "class_names": names}, tmp_path / "model.pth")
        cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
        if fits:
            check_config(cfg, training=False)
        else:
            with pytest.raises(UserError, match=r"does not fit the model: .* it alone has 'red', and lacks 'blue'"):
                check_config(cfg, training=False)


@pytest.mark.parametrize(
    ("config", "key"), [("faster_rcnn", "MODEL.ROI_HEADS.NUM_CLASSES"), ("fcos", "MODEL.RETINANET.NUM_CLASSES")]
)
def test_detectron2s_detectors_need_the_datasets_number_of_classes(config, key):
    check_config(load_experiment(config), training=True)
    with pytest.raises(UserError, match=rf"{key} is 7, but 'digits_train' .*set {key} 10"):
        check_config(load_experiment(config, key, 7), training=True)


def test_checks_register_and_change_nothing(shapes_root):
    """Not even the classes of a dataset that is known only by its annotation file."""
    register_coco_instances("unnamed", {}, str(shapes_root / "annotations.json"), str(shapes_root))
    entry = ["unregistered", str(shapes_root / "annotations.json"), str(shapes_root)]
    cfg = tiny_config("DATASETS.TRAIN", ("unnamed",), "DATASETS.TEST", (), "DATASETS.COCO_FORMAT", [entry])
    before = cfg.dump(), DatasetCatalog.list(), MetadataCatalog.get("unnamed").as_dict()
    with pytest.raises(UserError, match=r"NUM_CLASSES is 10, but 'unnamed' .*2 classes \(green, red\)"):
        check_config(cfg, training=True)
    cfg.MODEL.SAMDETR.NUM_CLASSES = 2
    check_config(cfg, training=True)
    cfg.MODEL.SAMDETR.NUM_CLASSES = 10
    assert before == (cfg.dump(), DatasetCatalog.list(), MetadataCatalog.get("unnamed").as_dict())


def test_precision_is_checked_for_evaluation_too():
    with pytest.raises(UserError, match=r"PRECISION is 'fp16': choose from 'bfloat16', 'float16'"):
        check_config(tiny_config("SOLVER.AMP.PRECISION", "fp16"), training=False)


def test_changed_keys_that_nothing_reads_are_found():
    options = ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.TIMM.NAME", "resnet18", "SOLVER.NESTEROV", True]
    assert ignored_keys(tiny_config()) == []
    assert ignored_keys(tiny_config(*options)) == options[::2]
    assert ignored_keys(tiny_config(*options, "SOLVER.OPTIMIZER", "SGD")) == options[:4:2]
    assert ignored_keys(tiny_config(*options, "MODEL.BACKBONE.NAME", "build_timm_backbone")) == options[::4]
    assert ignored_keys(tiny_config("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *options[:2])) == []


def test_a_good_config_passes():
    check_config(tiny_config(), training=True)
    check_config(tiny_config("DATASETS.TRAIN", ("no such dataset",)), training=False)
