"""What can be known to be wrong before training starts, said in words that name the key and the remedy."""

import difflib
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from itertools import zip_longest

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils.file_io import PathManager

from .cross_attention import CROSS_ATTENTION_REGISTRY
from .data.coco_format import register_coco_format
from .data.digits import DIGITS_DATASETS
from .encoder import ENCODER_REGISTRY
from .errors import UserError
from .query_generator import QUERY_GENERATOR_REGISTRY
from .semantics_aligner import SEMANTICS_ALIGNER_REGISTRY

__all__ = [
    "check_config",
    "check_loaded",
    "check_model",
    "check_weights_file",
    "class_parameters",
    "merge_options",
    "number_of_classes",
]


def _suggest(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_all_keys(value, f"{prefix}{key}."))
    return keys


def merge_options(cfg: CfgNode, config_file: str, options: list[str]) -> None:
    """Merge a YAML file (if named) and ``KEY VALUE`` options into ``cfg``.

    Raises:
        UserError: the file does not exist or is no YAML; a key does not exist; a value has another type.
    """
    if config_file and not PathManager.isfile(config_file):
        raise UserError(f"--config-file {config_file}: there is no such file (looked in {os.getcwd()}).")
    if len(options) % 2:
        raise UserError(f"Options at the end of the command come as pairs KEY VALUE, but there are {len(options)}.")
    source = config_file
    try:
        if config_file:
            cfg.merge_from_file(config_file)
        source = "the command line"
        cfg.merge_from_list(options)
    except (KeyError, AssertionError) as error:
        message = str(error.args[0] if error.args else error)
        key = message.removeprefix("Non-existent config key:").removeprefix("Non-existent key:").strip()
        if key == message or not key:
            raise UserError(f"{source}: {message}") from error
        raise UserError(f"{source}: there is no config key {key}.{_suggest(key, _all_keys(cfg))}") from error
    except Exception as error:  # YAML's and yacs's errors have no common base
        raise UserError(f"{source}: {type(error).__name__}: {error}") from error


def check_config(cfg: CfgNode, *, training: bool, resuming: bool = False) -> None:
    """Check what a run needs: registered names, divisibility, datasets and their classes, the weights file.

    Args:
        cfg: the full config.
        training: whether the run trains (else it only evaluates).
        resuming: whether it goes on from a checkpoint of its own, so that ``MODEL.WEIGHTS`` is not used.

    Raises:
        UserError: naming the key, what was found, and what to do.
    """
    check_model(cfg)
    register_coco_format(cfg)
    _check_precision(cfg)
    if training:
        _check_solver(cfg)
    if training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on.")
    if not training and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a dataset to evaluate on.")
    train_names = cfg.DATASETS.TRAIN if training else ()
    for key, names in (("DATASETS.TRAIN", train_names), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        for name in names:
            _check_dataset(key, name, cfg)
    _check_same_classes([*train_names, *cfg.DATASETS.TEST])
    if not resuming:
        check_weights_file(cfg.MODEL.WEIGHTS)


def check_model(cfg: CfgNode) -> None:
    """Check the names and numbers that the model is built from; errors as of :func:`check_config`."""
    _check_name("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY)
    _check_name("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY)
    if cfg.MODEL.META_ARCHITECTURE == "SAMDETR":
        _check_model(cfg.MODEL.SAMDETR)


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """The key that holds the number of classes of the config's meta-architecture, and its value; None if that is unknown."""
    for architectures, node in (
        (("SAMDETR",), "SAMDETR"),
        (("GeneralizedRCNN",), "ROI_HEADS"),
        (("RetinaNet", "build_fcos"), "RETINANET"),
    ):
        if cfg.MODEL.META_ARCHITECTURE in architectures:
            return f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES
    return "", None


def _check_name(key: str, name: str, registry) -> None:
    names = sorted(name for name, _ in registry)
    if name not in names:
        raise UserError(
            f"{key} is {name!r}, which is not registered; there are: {', '.join(names)}.{_suggest(name, names)}"
        )


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key} is {value!r}: choose from {', '.join(map(repr, choices))}.")


def _check_same_classes(names: list[str]) -> None:
    """Class i must mean the same in every dataset."""
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    classes = {name: found for name, found in classes.items() if found is not None}
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
    for key, value, least in (
        ("NUM_CLASSES", node.NUM_CLASSES, 1),
        ("NUM_QUERIES", node.NUM_QUERIES, 1),
        ("HIDDEN_DIM", node.HIDDEN_DIM, 4),
        ("NUM_HEADS", node.NUM_HEADS, 1),
        ("DECODER.NUM_LAYERS", node.DECODER.NUM_LAYERS, 1),
        ("ENCODER.NUM_LAYERS", node.ENCODER.NUM_LAYERS, 0),
        ("ALIGNER.POOLED_SIZE", node.ALIGNER.POOLED_SIZE, 1),
        ("ALIGNER.REDUCTION", node.ALIGNER.REDUCTION, 1),
        ("ALIGNER.NUM_KEYPOINTS", node.ALIGNER.NUM_KEYPOINTS, 0),
        ("CROSS_ATTENTION.NUM_POINTS", node.CROSS_ATTENTION.NUM_POINTS, 1),
        ("ENCODER.NUM_POINTS", node.ENCODER.NUM_POINTS, 1),
        ("PROJECTION_NUM_GROUPS", node.PROJECTION_NUM_GROUPS, 0),
    ):
        if value < least:
            raise UserError(f"MODEL.SAMDETR.{key} is {value}: it must be at least {least}.")
    for divisor_key, divisor in (
        ("MODEL.SAMDETR.NUM_HEADS", node.NUM_HEADS),
        ("MODEL.SAMDETR.PROJECTION_NUM_GROUPS", node.PROJECTION_NUM_GROUPS or 1),
        ("4 (sines and cosines of x and y)", 4),
    ):
        if node.HIDDEN_DIM % divisor:
            raise UserError(
                f"MODEL.SAMDETR.HIDDEN_DIM ({node.HIDDEN_DIM}) is not divisible by {divisor_key}"
                f"{f' ({divisor})' if 'MODEL' in divisor_key else ''}: change one of them."
            )


def _check_dataset(key: str, name: str, cfg: CfgNode) -> None:
    registered = DatasetCatalog.list()
    if name not in registered:
        raise UserError(
            f"{key} names {name!r}, which is not a registered dataset.{_suggest(name, registered)} Name your own in "
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
    key_of_number, number = number_of_classes(cfg)
    if number is not None:
        if metadata.get("thing_classes") is None:
            DatasetCatalog.get(name)  # a COCO-format dataset learns its classes when it is loaded
        classes = metadata.get("thing_classes")
        if classes is not None and len(classes) != number:
            some = ", ".join(classes[:5]) + (", ..." if len(classes) > 5 else "")
            raise UserError(
                f"{key_of_number} is {number}, but {name!r} ({key}) has {len(classes)} classes ({some}): set {key_of_number} "
                f"{len(classes)}."
            )


def check_weights_file(path: str, given_as: str = "MODEL.WEIGHTS") -> None:
    """Check that a weights file on this machine is there and can be read; addresses are left to detectron2.

    Args:
        path: of the file.
        given_as: what to call it in a message: the key or option that names it.

    Raises:
        UserError: it is missing, truncated, not a checkpoint, or holds objects that are refused for safety.
    """
    path = path.split("?")[0]
    if not path or "://" in path:
        return
    if not PathManager.isfile(path):
        raise UserError(f"{given_as} {path}: there is no such file (looked in {os.getcwd()}).")
    if path.endswith(".pkl"):
        return
    try:
        torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        if isinstance(error, pickle.UnpicklingError) and zipfile.is_zipfile(path):
            raise UserError(
                f"{given_as} {path} holds Python objects beside tensors, which are not loaded for safety. If you trust "
                'it, load it once with torch.load(path, weights_only=False) and save only its "model" entry.'
            ) from error
        raise UserError(
            f"{given_as} {path} is truncated, damaged or not a checkpoint ({type(error).__name__}): copy it again, or "
            "name another file."
        ) from error


# Parameters whose first dimension follows from the number of classes; the last two lines are detectron2's detectors'.
_CLASS_PARAMETERS = re.compile(
    r"decoder\.class_heads\.\d+\.(weight|bias)|query_generator\.label_embedding\.weight"
    r"|roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)\.(weight|bias)"
    r"|head\.cls_score\.(weight|bias)"
)


def class_parameters(names: Iterable[str]) -> list[str]:
    """Those of the parameters that depend on the number of classes."""
    return sorted(name for name in names if _CLASS_PARAMETERS.fullmatch(name))


def check_loaded(path: str, model: torch.nn.Module, state_dict: dict, *, complete: bool) -> None:
    """Check that a checkpoint fits a model.

    Args:
        path: of the checkpoint, for the message.
        model: the model.
        state_dict: the checkpoint's ``model`` entry, in this project's names.
        complete: whether every parameter must come from the checkpoint (evaluation). Else the file may hold a part of the
            model, such as its backbone, and other numbers of classes; but what it holds of the model must fit.

    Raises:
        UserError: it does not fit.
    """
    foreign = [name for name, value in state_dict.items() if not hasattr(value, "shape")]
    if foreign:
        raise UserError(
            f"{path} is not a checkpoint of this project: beside tensors it has the entries {', '.join(foreign[:5])}. It "
            'needs an entry "model" with the parameters; tools/convert_checkpoint.py converts the authors\' files.'
        )
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name.removeprefix("module."): tuple(value.shape) for name, value in state_dict.items()}
    fitting = {name for name, shape in own.items() if shapes.get(name) == shape}
    wrong = [name for name in own if name not in fitting and (complete or name in shapes)]
    if not complete:
        anew = class_parameters(wrong)
        wrong = [name for name in wrong if name not in anew or shapes[name][1:] != own[name][1:]]
    if wrong:
        name = next((name for name in wrong if name in shapes), wrong[0])
        found = f"has shape {shapes[name]} in the file" if name in shapes else "is not in the file"
        raise UserError(
            f"{path} is of another architecture than the config: {len(wrong)} of {len(own)} parameters do "
            f"not fit; {name}, of shape {own[name]} in the model, {found}. Use the config that the checkpoint was trained "
            "with (config.yaml beside it)."
        )
    if not fitting:
        raise UserError(
            f"{path} has no parameter that fits this model: its first is {next(iter(shapes), None)!r}, the "
            f"model's {next(iter(own))!r}."
        )
