"""Find out, before a run starts, what can be known to be wrong with it.

The checks change and register nothing. Their messages name the key and the remedy.
"""

import os
from itertools import zip_longest

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from .checkpoint import Checkpoint
from .config import number_of_classes
from .data.coco_format import read_class_names
from .data.digits import DIGITS_DATASETS
from .errors import UserError, did_you_mean
from .modeling import CROSS_ATTENTION_REGISTRY, ENCODER_REGISTRY, QUERY_GENERATOR_REGISTRY, SEMANTICS_ALIGNER_REGISTRY

__all__ = ["check_config", "check_model"]


def check_config(cfg: CfgNode, *, training: bool, weights: bool = True) -> None:
    """Check what a run needs: registered names, divisibility, datasets and their classes, the weights file.

    Args:
        cfg: the full config. Its datasets must be registered (``samdetr.data.register_coco_format``).
        training: whether the run trains; otherwise it only evaluates.
        weights: whether to check ``MODEL.WEIGHTS`` as well, which a run that is resumed, or a loaded model, does not need.

    Raises:
        UserError: something is wrong; the message names the key, what was found, and what to do.
    """
    check_model(cfg)
    _check_precision(cfg)
    if training:
        _check_solver(cfg)
    if training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
    if not training and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a dataset to evaluate on.")
    train_names = cfg.DATASETS.TRAIN if training else ()
    classes: dict[str, list[str] | None] = {}
    for key, names in (("DATASETS.TRAIN", train_names), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        for name in names:
            _check_dataset(key, name)
            if name not in classes:
                classes[name] = _classes_of(name)
            _check_number_of_classes(key, name, classes[name], cfg)
    _check_same_classes({name: found for name, found in classes.items() if found is not None})
    if weights:
        Checkpoint.read_local(cfg.MODEL.WEIGHTS)


def check_model(cfg: CfgNode) -> None:
    """Check the names and numbers that the model is built from; for errors see :func:`check_config`."""
    _check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    _check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    if cfg.MODEL.META_ARCHITECTURE == "SAMDETR":
        _check_model(cfg.MODEL.SAMDETR)


def _check_name(key: str, name: str, registry) -> None:
    names = sorted(name for name, _ in registry)
    if name not in names:
        raise UserError(
            f"{key} is {name!r}, which is not registered; there are: {', '.join(names)}.{did_you_mean(name, names)}"
        )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}: choose from {', '.join(map(repr, choices))}.")


def _check_same_classes(classes: dict[str, list[str]]) -> None:
    """Check that class i means the same in every dataset, from each dataset's classes."""
    for name, found in classes.items():
        first = next(iter(classes))
        if list(found) != list(classes[first]):
            pairs = list(zip_longest(classes[first], found))
            different = next(i for i, (a, b) in enumerate(pairs) if a != b)
            raise UserError(
                f"{first!r} and {name!r} have different classes or orders of classes: number {different} is "
                f"{pairs[different][0]!r} in the first and {pairs[different][1]!r} in the second. Classes are ordered by their "
                "category ids: give them the same ids in both annotation files."
            )


def _classes_of(name: str) -> list[str] | None:
    """Return the classes of a registered dataset, from its metadata or its annotation file; None if neither names them."""
    metadata = MetadataCatalog.get(name)
    classes, json_file = metadata.get("thing_classes"), metadata.get("json_file")
    if classes is None and json_file and PathManager.isfile(json_file):
        return read_class_names(json_file)
    return classes


def _check_precision(cfg: CfgNode) -> None:
    _check_choice("SOLVER.AMP.PRECISION", cfg.SOLVER.AMP.PRECISION, ("bfloat16", "float16"))
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16" and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise UserError("SOLVER.AMP.PRECISION 'float16' needs CUDA: use 'bfloat16' on the CPU.")


def _check_solver(cfg: CfgNode) -> None:
    _check_choice("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, ("AdamW", "SGD"))
    _check_choice("SOLVER.NON_FINITE", cfg.SOLVER.NON_FINITE, ("stop", "skip"))
    _check_choice("DATALOADER.UNREADABLE_IMAGES", cfg.DATALOADER.UNREADABLE_IMAGES, ("stop", "skip"))
    if not 1 <= cfg.SOLVER.ACCUMULATION_STEPS <= cfg.SOLVER.IMS_PER_BATCH:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}: it must be between 1 and "
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH})."
        )
    if not 0 <= cfg.SOLVER.EMA.DECAY < 1:
        raise UserError(f"SOLVER.EMA.DECAY is {cfg.SOLVER.EMA.DECAY}: it must be in [0, 1), for example 0.9998.")
    for key, value, supported in (
        ("DATALOADER.SAMPLER_TRAIN", cfg.DATALOADER.SAMPLER_TRAIN, "TrainingSampler"),
        ("TEST.PRECISE_BN.ENABLED", cfg.TEST.PRECISE_BN.ENABLED, False),
    ):
        if value != supported:
            raise UserError(f"{key} is {value!r}, which this trainer does not support: set it to {supported!r}.")


def _check_model(node: CfgNode) -> None:
    for key, registry in (
        ("ENCODER", ENCODER_REGISTRY),
        ("QUERY_GENERATOR", QUERY_GENERATOR_REGISTRY),
        ("ALIGNER", SEMANTICS_ALIGNER_REGISTRY),
        ("CROSS_ATTENTION", CROSS_ATTENTION_REGISTRY),
    ):
        _check_name(f"MODEL.SAMDETR.{key}.NAME", node[key].NAME, registry)
    for key, least in (
        ("NUM_CLASSES", 1),
        ("NUM_QUERIES", 1),
        ("HIDDEN_DIM", 4),
        ("NUM_HEADS", 1),
        ("DECODER.NUM_LAYERS", 1),
        ("ENCODER.NUM_LAYERS", 0),
        ("ALIGNER.POOLED_SIZE", 1),
        ("ALIGNER.REDUCTION", 1),
        ("ALIGNER.NUM_KEYPOINTS", 0),
        ("CROSS_ATTENTION.NUM_POINTS", 1),
        ("ENCODER.NUM_POINTS", 1),
        ("PROJECTION_NUM_GROUPS", 0),
    ):
        if _value(node, key) < least:
            raise UserError(f"MODEL.SAMDETR.{key} is {_value(node, key)}: it must be at least {least}.")
    for key, divisor_key in (
        ("HIDDEN_DIM", "NUM_HEADS"),
        ("HIDDEN_DIM", "PROJECTION_NUM_GROUPS"),
        ("HIDDEN_DIM", "ALIGNER.REDUCTION"),
        ("NUM_HEADS", "ALIGNER.NUM_KEYPOINTS"),
    ):
        value, divisor = (_value(node, name) for name in (key, divisor_key))
        if divisor and value % divisor:
            raise UserError(
                f"MODEL.SAMDETR.{key} ({value}) is not divisible by MODEL.SAMDETR.{divisor_key} ({divisor}): change one of "
                "them."
            )
    if node.HIDDEN_DIM % 4:
        raise UserError(
            f"MODEL.SAMDETR.HIDDEN_DIM is {node.HIDDEN_DIM}: it must be a multiple of 4 (for sines and cosines of x and y)."
        )


def _value(node: CfgNode, key: str):
    """Return the value of a key such as "ALIGNER.REDUCTION"."""
    for name in key.split("."):
        node = node[name]
    return node


def _check_dataset(key: str, name: str) -> None:
    registered = DatasetCatalog.list()
    if name not in registered:
        raise UserError(
            f"{key} names {name!r}, which is not a registered dataset.{did_you_mean(name, registered)} Name your own in "
            "DATASETS.COCO_FORMAT."
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
