"""Find out, before a run starts, what can be known to be wrong with it.

The checks change and register nothing. Their messages name the key and the remedy.
"""

import os
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from .checkpoint import Checkpoint
from .config import add_samdetr_config, number_of_classes
from .data import class_names_of, classes_by_index, match_classes, read_dataset
from .data.digits import DIGITS_DATASETS
from .errors import UserError, did_you_mean
from .limits import (
    COMMON_CHOICES,
    COMMON_RANGES,
    OTHER_DETECTORS_NODES,
    RUN_CHOICES,
    SET_DETECTOR_RANGES,
    SET_DETECTORS,
    TRAINING_RANGES,
    UNSUPPORTED,
    UNSUPPORTED_BY_BASELINES,
    UNSUPPORTED_BY_SET_DETECTORS,
    UNSUPPORTED_BY_TRANSFORMERS,
    Range,
    value_of,
)
from .modeling import CROSS_ATTENTION_REGISTRY, ENCODER_REGISTRY, QUERY_GENERATOR_REGISTRY, SEMANTICS_ALIGNER_REGISTRY

__all__ = ["check_config", "check_model", "ignored_keys"]


def check_config(
    cfg: CfgNode, *, training: bool, weights: bool = True, class_names: Sequence[str] | None = None
) -> None:
    """Check what a run needs: registered names, ranges, divisibility, datasets and their classes, the weights file.

    Args:
        cfg: the full config. Its datasets must be registered (``samdetr.data.register_datasets``).
        training: whether the run trains; otherwise it only evaluates.
        weights: whether to check ``MODEL.WEIGHTS`` as well, which a run that is resumed, or a loaded model, does not need.
        class_names: of the model that is evaluated, by index, if it is not read from ``MODEL.WEIGHTS``.

    Raises:
        UserError: something is wrong; the message names the key, what was found, and what to do.
    """
    check_model(cfg)
    _check_unsupported(cfg)
    _check_choices(cfg, RUN_CHOICES)
    _check_device(cfg, training)
    _check_precision(cfg)
    _check_input(cfg)
    if training:
        _check_ranges(cfg, TRAINING_RANGES)
        _check_solver(cfg)
    if training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
    if not training and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a dataset to evaluate on.")
    for key, names in (
        ("DATASETS.TRAIN", cfg.DATASETS.TRAIN if training else ()),
        ("DATASETS.TEST", cfg.DATASETS.TEST),
    ):
        if not all(isinstance(name, str) for name in names):
            raise UserError(f"{key} is {tuple(names)}: it must be names of datasets.")
        if len(set(names)) < len(names):
            raise UserError(f"{key} is {tuple(names)}: name each dataset once.")
    checkpoint = Checkpoint.read_local(cfg.MODEL.WEIGHTS) if weights else None
    if not training and checkpoint is not None and class_names is None:
        class_names = checkpoint.class_names or classes_by_index(cfg.DATASETS.TRAIN, number_of_classes(cfg)[1])[0]
    classes = {"the model": list(class_names)} if class_names is not None else {}
    skip_missing = cfg.DATALOADER.UNREADABLE_IMAGES == "skip"
    for key in ("DATASETS.TRAIN", "DATASETS.TEST") if training else ("DATASETS.TEST",):
        learned = key == "DATASETS.TRAIN"
        for name in cfg.DATASETS.TRAIN if learned else cfg.DATASETS.TEST:
            _check_dataset(key, name)
            read_dataset(name, training=learned, skip_missing=learned and skip_missing)
            found = class_names_of(name)
            _check_number_of_classes(key, name, found, cfg)
            if found is not None:
                _check_same_classes(name, found, classes)
                classes[repr(name)] = found


def check_model(cfg: CfgNode) -> None:
    """Check the names and numbers that the model is built from; for errors see :func:`check_config`."""
    _check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    _check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    if cfg.MODEL.META_ARCHITECTURE in SET_DETECTORS:
        _check_set_detector(cfg)
    _check_choices(cfg, COMMON_CHOICES)
    _check_ranges(cfg, COMMON_RANGES)
    if cfg.MODEL.META_ARCHITECTURE == "TransformersDETR":
        _check_transformers(cfg)


def ignored_keys(cfg: CfgNode) -> list[str]:
    """Return the keys that are not at their default although nothing reads them: those of another kind of detector, backbone,
    optimizer or sampler. A config that inherits from one of detectron2's may well have some.
    """
    default = get_cfg()
    add_samdetr_config(default)
    keys = ["DATALOADER.REPEAT_THRESHOLD"]
    if cfg.MODEL.META_ARCHITECTURE in SET_DETECTORS:
        pooled = "ROI_BOX_HEAD" if cfg.MODEL.META_ARCHITECTURE == "SparseRCNN" else None
        keys += [f"MODEL.{node}.{key}" for node in OTHER_DETECTORS_NODES if node != pooled for key in cfg.MODEL[node]]
    if "timm" not in cfg.MODEL.BACKBONE.NAME:
        keys += [f"MODEL.TIMM.{key}" for key in cfg.MODEL.TIMM]
    if cfg.SOLVER.OPTIMIZER == "AdamW":
        keys += ["SOLVER.MOMENTUM", "SOLVER.NESTEROV"]
    return [key for key in keys if value_of(cfg, key) != value_of(default, key)]


def _check_name(key: str, name: str, registry) -> None:
    names = sorted(name for name, _ in registry)
    if name not in names:
        near = did_you_mean(str(name), names)
        raise UserError(f"{key} is {name!r}, which is not registered; there are: {', '.join(names)}.{near}")


def _check_same_classes(name: str, found: list[str], others: dict[str, list[str]]) -> None:
    """Check that a dataset has the classes of the model or of another dataset, in any order."""
    for other, names in others.items():
        try:
            match_classes(found, names)
        except UserError as error:
            raise UserError(f"The dataset {name!r} does not fit {other}: {error}") from error


def _check_device(cfg: CfgNode, training: bool) -> None:
    try:
        device = torch.device(str(cfg.MODEL.DEVICE))
    except RuntimeError as error:
        raise UserError(f"There is no MODEL.DEVICE {cfg.MODEL.DEVICE!r}: use cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}: use cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but there are {torch.cuda.device_count()} CUDA devices here."
        )
    if training and device.type == "cpu" and any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE):
        raise UserError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE has deformable convolutions, which detectron2 cannot train on the CPU: set "
            "MODEL.DEVICE cuda, or DEFORM_ON_PER_STAGE [False, False, False, False]."
        )


def _check_precision(cfg: CfgNode) -> None:
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError("SOLVER.AMP.PRECISION 'float16' needs CUDA: use 'bfloat16' on the CPU.")


def _check_solver(cfg: CfgNode) -> None:
    if not 1 <= cfg.SOLVER.ACCUMULATION_STEPS <= cfg.SOLVER.IMS_PER_BATCH:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}: it must be between 1 and "
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH})."
        )
    if cfg.SOLVER.PATIENCE and not (cfg.TEST.EVAL_PERIOD and cfg.DATASETS.TEST):
        raise UserError(
            f"SOLVER.PATIENCE is {cfg.SOLVER.PATIENCE}, but nothing is evaluated during training: set TEST.EVAL_PERIOD and "
            "DATASETS.TEST, or PATIENCE 0."
        )
    if cfg.INPUT.AUGMENTATION_OFF_ITERS > cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"INPUT.AUGMENTATION_OFF_ITERS is {cfg.INPUT.AUGMENTATION_OFF_ITERS}, more than SOLVER.MAX_ITER "
            f"({cfg.SOLVER.MAX_ITER}): lower it."
        )
    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    if decay is not None and not (isinstance(decay, (int, float)) and 0 <= decay <= 1):
        raise UserError(f"SOLVER.WEIGHT_DECAY_BIAS is {decay}: it must be None or between 0 and 1.")
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) is not divisible by SOLVER.REFERENCE_WORLD_SIZE "
            f"({reference}): change one of them."
        )
    if cfg.SOLVER.OPTIMIZER == "SGD" and cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM:
        raise UserError("SOLVER.NESTEROV needs SOLVER.MOMENTUM, which is 0: raise it.")
    if cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupMultiStepLR" and cfg.SOLVER.BASE_LR_END > cfg.SOLVER.BASE_LR:
        raise UserError(
            f"SOLVER.BASE_LR_END ({cfg.SOLVER.BASE_LR_END}) is more than SOLVER.BASE_LR ({cfg.SOLVER.BASE_LR}): lower it."
        )
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR" and cfg.SOLVER.NUM_DECAYS >= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"SOLVER.NUM_DECAYS ({cfg.SOLVER.NUM_DECAYS}) must be less than SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER})."
        )
    if cfg.SOLVER.RESCALE_INTERVAL and cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"SOLVER.WARMUP_ITERS ({cfg.SOLVER.WARMUP_ITERS}) leaves nothing of SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER}) to "
            "the schedule, which SOLVER.RESCALE_INTERVAL fits into the rest: lower it."
        )
    steps = list(cfg.SOLVER.STEPS)
    if not all(isinstance(step, int) and step > 0 for step in steps) or steps != sorted(set(steps)):
        raise UserError(f"SOLVER.STEPS is {tuple(steps)}: it must be iterations, 1 or more, in ascending order.")


def _check_ranges(cfg: CfgNode, ranges: dict[str, Range]) -> None:
    for key, limits in ranges.items():
        value = value_of(cfg, key)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(number, (int, float)) or number not in limits:
                raise UserError(f"{key} is {value}: it must be {limits}.")


def _check_choices(cfg: CfgNode, choices: dict[str, tuple]) -> None:
    for key, allowed in choices.items():
        value = value_of(cfg, key)
        if value not in allowed:
            raise UserError(
                f"{key} is {value!r}: choose from {', '.join(map(repr, allowed))}.{did_you_mean(str(value), map(str, allowed))}"
            )


def _check_unsupported(cfg: CfgNode) -> None:
    """Refuse what would have no effect here, so that nobody relies on it."""
    refused = dict(UNSUPPORTED)
    name = cfg.MODEL.META_ARCHITECTURE
    if name in SET_DETECTORS:
        refused |= UNSUPPORTED_BY_SET_DETECTORS
        if name != "SAMDETR":
            refused |= UNSUPPORTED_BY_BASELINES
        if name == "TransformersDETR":
            refused |= UNSUPPORTED_BY_TRANSFORMERS
        elif name != "SAMDETR":
            refused["MODEL.SAMDETR.QUERY_GENERATOR.NAME"] = "LearnedQueryGenerator"
        if name != "SMCADETR":
            refused["MODEL.SAMDETR.DROPOUT"] = 0.0
    for key, supported in refused.items():
        value = value_of(cfg, key)
        if (tuple(value) if isinstance(value, list) else value) != supported:
            raise UserError(f"{key} is {value!r}, which has no effect here: set it to {supported!r}.")


def _check_input(cfg: CfgNode) -> None:
    for key in ("INPUT.MIN_SIZE_TRAIN", "INPUT.DETR_CROP.MIN_SIZE", "INPUT.DETR_CROP.SIZE", "MODEL.PIXEL_STD"):
        if not len(value_of(cfg, key)):
            raise UserError(f"{key} is empty: give it one value or more.")
    for key, what in (("DETR_CROP.SIZE", "side"), ("LARGE_SCALE_JITTER.SCALE", "multiple")):
        smallest, *largest = value_of(cfg.INPUT, key) or (0,)
        if len(largest) != 1 or smallest > largest[0]:
            raise UserError(
                f"INPUT.{key} is {value_of(cfg.INPUT, key)}: it must be the smallest and the largest {what}."
            )
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(cfg.INPUT.MIN_SIZE_TRAIN) != 2:
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN is {cfg.INPUT.MIN_SIZE_TRAIN}: with INPUT.MIN_SIZE_TRAIN_SAMPLING 'range' it must be the "
            "smallest and the largest size."
        )
    for key in ("MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"):
        if len(value_of(cfg, key)) != 3:
            raise UserError(f"{key} is {value_of(cfg, key)}: it must be three values, one per colour.")
    if not isinstance(cfg.OUTPUT_DIR, str) or not cfg.OUTPUT_DIR:
        raise UserError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}: name a folder.")
    if cfg.OUTPUT_DIR.startswith("~"):
        raise UserError(f"OUTPUT_DIR is {cfg.OUTPUT_DIR!r}: write {os.path.expanduser(cfg.OUTPUT_DIR)!r}.")
    if cfg.TEST.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        raise UserError("TEST.EXPECTED_RESULTS is set, but DATASETS.TEST is empty: name a dataset to evaluate on.")
    for entry in cfg.TEST.EXPECTED_RESULTS:
        formed = isinstance(entry, (list, tuple)) and len(entry) == 4
        if not formed or not all(isinstance(value, (int, float)) for value in entry[2:]) or entry[0] != "bbox":
            raise UserError(
                f"TEST.EXPECTED_RESULTS has the entry {entry!r}: each is ['bbox', metric, value, tolerance], such as "
                "['bbox', 'AP', 40.0, 0.5]."
            )
    if cfg.TEST.EXPECTED_RESULTS and len(cfg.DATASETS.TEST) > 1:
        raise UserError("TEST.EXPECTED_RESULTS is for one dataset, but DATASETS.TEST names several: name one of them.")


def _check_set_detector(cfg: CfgNode) -> None:
    node = cfg.MODEL.SAMDETR
    for key, registry in (
        ("ENCODER", ENCODER_REGISTRY),
        ("QUERY_GENERATOR", QUERY_GENERATOR_REGISTRY),
        ("ALIGNER", SEMANTICS_ALIGNER_REGISTRY),
        ("CROSS_ATTENTION", CROSS_ATTENTION_REGISTRY),
    ):
        _check_name(f"MODEL.SAMDETR.{key}.NAME", node[key].NAME, registry)
    _check_ranges(cfg, SET_DETECTOR_RANGES)
    for key, divisor_key in (
        ("HIDDEN_DIM", "NUM_HEADS"),
        ("HIDDEN_DIM", "PROJECTION_NUM_GROUPS"),
        ("HIDDEN_DIM", "ALIGNER.REDUCTION"),
        ("NUM_HEADS", "ALIGNER.NUM_KEYPOINTS"),
    ):
        value, divisor = (value_of(node, name) for name in (key, divisor_key))
        if divisor and value % divisor:
            raise UserError(
                f"MODEL.SAMDETR.{key} ({value}) is not divisible by MODEL.SAMDETR.{divisor_key} ({divisor}): change one of "
                "them."
            )
    if node.HIDDEN_DIM % 4:
        raise UserError(
            f"MODEL.SAMDETR.HIDDEN_DIM is {node.HIDDEN_DIM}: it must be a multiple of 4 (for sines and cosines of x and y)."
        )
    for key, other, without, needed in (
        ("QUERY_GENERATOR.CONTENT_FROM_ENCODER", "QUERY_GENERATOR.SELECT_FROM_ENCODER", False, True),
        ("QUERY_GENERATOR.DN_NEGATIVES", "QUERY_GENERATOR.NAME", "LearnedQueryGenerator", "DenoisingQueryGenerator"),
        ("DECODER.LOOK_FORWARD_TWICE", "DECODER.BOX_REFINEMENT", False, True),
        ("ALIGNER.POOLED_CONTENT", "ALIGNER.NAME", "IdentityAligner", "SemanticsAligner"),
    ):
        if value_of(node, key) and value_of(node, other) == without:
            raise UserError(
                f"MODEL.SAMDETR.{key} is True, which has no effect while MODEL.SAMDETR.{other} is {without!r}: set that to "
                f"{needed!r}, or {key} False."
            )
    if 0 < node.LOSS.FOCAL_GAMMA < 1:
        raise UserError(
            f"MODEL.SAMDETR.LOSS.FOCAL_GAMMA is {node.LOSS.FOCAL_GAMMA}, between 0 and 1, where the loss has infinite "
            "gradients: use 0, or 1 or more."
        )
    generator = node.QUERY_GENERATOR
    if generator.DN_NEGATIVES and not generator.DN_BOX_NOISE:
        raise UserError(
            "MODEL.SAMDETR.QUERY_GENERATOR.DN_NEGATIVES needs noise to tell objects from background, but DN_BOX_NOISE is 0: "
            "raise it, or set DN_NEGATIVES False."
        )
    if not any(node.MATCHER.values()):
        raise UserError("All weights in MODEL.SAMDETR.MATCHER are 0, so that nothing is matched: raise one of them.")
    if not any(node.LOSS[key] for key in ("CLASS_WEIGHT", "L1_WEIGHT", "GIOU_WEIGHT")):
        raise UserError("All weights in MODEL.SAMDETR.LOSS are 0, so that nothing is learned: raise one of them.")
    for key in ("MODEL.SAMDETR.IN_FEATURES", "MODEL.RESNETS.OUT_FEATURES"):
        if not value_of(cfg, key):
            raise UserError(f"{key} is empty: name outputs of the backbone, such as 'res5'.")
    outputs = ("stem", "res2", "res3", "res4", "res5")
    for name in cfg.MODEL.RESNETS.OUT_FEATURES:
        if name not in outputs:
            raise UserError(f"MODEL.RESNETS.OUT_FEATURES names {name!r}: choose from {', '.join(map(repr, outputs))}.")


def _check_transformers(cfg: CfgNode) -> None:
    """Check what the networks of ``transformers`` need."""
    node, name, levels = cfg.MODEL.SAMDETR, cfg.MODEL.TRANSFORMERS.DETECTOR, cfg.MODEL.TRANSFORMERS.NUM_LEVELS
    maps = len(node.IN_FEATURES)
    if name != "deformable_detr" and (maps, levels) != (1, 1):
        raise UserError(
            f"MODEL.SAMDETR.IN_FEATURES has {maps} maps and MODEL.TRANSFORMERS.NUM_LEVELS is {levels}, but {name} has one "
            "level: name one map, and set NUM_LEVELS 1."
        )
    if levels < maps:
        raise UserError(
            f"MODEL.TRANSFORMERS.NUM_LEVELS is {levels}, less than the {maps} maps of MODEL.SAMDETR.IN_FEATURES: raise it."
        )
    if name == "deformable_detr" and node.HIDDEN_DIM % 32:
        raise UserError(
            f"MODEL.SAMDETR.HIDDEN_DIM is {node.HIDDEN_DIM}: deformable_detr needs a multiple of 32 (the groups of its norms)."
        )
    if node.QUERY_GENERATOR.NAME not in ("LearnedQueryGenerator", *["DenoisingQueryGenerator"] * (name == "dab_detr")):
        raise UserError(
            f"MODEL.SAMDETR.QUERY_GENERATOR.NAME is {node.QUERY_GENERATOR.NAME!r}, which {name} does not have: set it to "
            "'LearnedQueryGenerator' (dab_detr alone may have 'DenoisingQueryGenerator' as well)."
        )


def _check_dataset(key: str, name: str) -> None:
    registered = DatasetCatalog.list()
    if name not in registered:
        raise UserError(
            f"{key} names {name!r}, which is not a registered dataset.{did_you_mean(name, registered)} Name your own in "
            "DATASETS.COCO_FORMAT, VOC_FORMAT or YOLO_FORMAT."
        )
    metadata = MetadataCatalog.get(name)
    json_file = metadata.get("json_file")
    made_when_loaded = name in DIGITS_DATASETS
    for what, path in (("annotation file", json_file), ("image folder", metadata.get("image_root"))):
        if path and not made_when_loaded and not PathManager.exists(path):
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            raise UserError(
                f"{key} names {name!r}, whose {what} {os.path.abspath(path)} does not exist. detectron2's datasets are "
                f"looked for below DETECTRON2_DATASETS, now {os.path.abspath(root)}: set it to the folder that holds them "
                "(for COCO, the folder above coco/)."
            )


def _check_number_of_classes(key: str, name: str, classes: list[str] | None, cfg: CfgNode) -> None:
    key_of_number, number = number_of_classes(cfg)
    if number is not None and classes is not None and len(classes) != number:
        some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
        raise UserError(
            f"{key_of_number} is {number}, but {name!r} ({key}) has {len(classes)} classes ({some}): set {key_of_number} "
            f"{len(classes)}."
        )
