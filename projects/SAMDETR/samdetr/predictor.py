"""From a trained checkpoint to detections in images, in two lines.

predictor = samdetr.load("model_final.pth")
instances = predictor("street.jpg")
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager

from .checkpoint import CheckedCheckpointer, Checkpoint, check_fit
from .checks import check_model
from .config import load_config, merge_options
from .data import classes_by_index, match_classes, register_datasets
from .data.images import ImageSource, check_regular_file, files_below, read_image
from .errors import UserError, one_line, one_line_each
from .limits import SET_DETECTORS
from .modeling.build import build_detector
from .solver import autocast

__all__ = ["ImageSource", "Predictor", "list_images", "load", "read_image"]

logger = logging.getLogger(__name__)


class Predictor:
    """A model in evaluation mode, with the reading, resizing and batching of images in front of it.

    Attributes:
        cfg: the model's config.
        model: the model.
        class_names: the classes' names, by index; made up if they are not known.
        knows_classes: whether they are known.
        category_ids: the ids of the classes in the training dataset, by index.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: torch.nn.Module,
        class_names: Sequence[str] | None = None,
        category_ids: Sequence[int] | None = None,
    ):
        self.cfg = cfg
        self.model = model.eval()
        number = cfg.MODEL.SAMDETR.NUM_CLASSES
        if isinstance(class_names, str):
            raise UserError("class_names is a text: give a list of names.", argument="class_names")
        if class_names is not None and len(class_names) != number:
            raise UserError(
                f"There are {len(class_names)} class names for a model of {number} classes: give one name per class.",
                argument="class_names",
            )
        if category_ids is not None and len(category_ids) != number:
            raise UserError(
                f"There are {len(category_ids)} category ids for a model of {number} classes: it is damaged."
            )
        self.knows_classes = class_names is not None
        self.class_names = one_line_each(class_names or [f"class {i}" for i in range(number)])
        self.category_ids = list(category_ids or range(number))

    def __call__(self, images: ImageSource | Iterable[ImageSource], batch_size: int = 1) -> Instances | list[Instances]:
        """Detect objects.

        Args:
            images: one image or several, each a path, a PIL image, the bytes of a file, or an array (H, W, 3) in RGB; see
                :func:`samdetr.data.images.open_picture`.
            batch_size: how many images go through the model at once. Images of different sizes are padded to the largest
                of them, which changes results slightly; one at a time is exact.

        Returns:
            For one image detectron2's :class:`Instances`, on the CPU; for several a list of them. Each has ``pred_boxes`` in
            the image's pixels, ``scores`` in (0, 1), ``pred_classes`` (indices into ``class_names``) and ``query_indices``,
            best first, ``TEST.DETECTIONS_PER_IMAGE`` of them at most. Choose a threshold: scores of focal loss are lower than a
            softmax's, and 0.3 is a good start.

        Raises:
            UserError: an image cannot be read.
        """
        if isinstance(images, ImageSource):
            return self([images])[0]
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be 1 or more.")
        results, remaining = [], iter(images)  # which may be the frames of a film: not all at once
        while batch := [self.prepare(self.read(image)) for image in itertools.islice(remaining, batch_size)]:
            with torch.no_grad(), autocast(self.cfg, self.model.device):
                results += [output["instances"].to("cpu") for output in self.model(batch)]
        return results

    def read(self, image: ImageSource) -> np.ndarray:
        """Read an image of at most ``INPUT.MAX_PIXELS`` as (H, W, 3) uint8, RGB; see :func:`samdetr.data.images.read_image`."""
        return read_image(image, self.cfg.INPUT.MAX_PIXELS)

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Turn an image (H, W, 3) uint8, RGB, into detectron2's model input."""
        height, width = image.shape[:2]
        resized = image
        shortest, longest = self.cfg.INPUT.MIN_SIZE_TEST, self.cfg.INPUT.MAX_SIZE_TEST
        if shortest:  # 0 means as it is
            sides = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
            resized = T.ResizeTransform(height, width, *(max(1, side) for side in sides)).apply_image(image)
        if self.cfg.INPUT.FORMAT == "BGR":
            resized = resized[:, :, ::-1]
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def load(
    source: str | os.PathLike,
    *,
    config_file: str | os.PathLike | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    options: Sequence[Any] = (),
) -> Predictor:
    """Load a trained model. A checkpoint is opened once.

    Args:
        source: a checkpoint that this project has saved, which carries its config and class names; or a config file, whose
            ``MODEL.WEIGHTS`` is loaded.
        config_file: the config of a checkpoint that carries none, or another one than it carries; a path or a name, see
            :func:`samdetr.load_config`. Not if ``source`` is a config itself.
        class_names: the classes' names, if the checkpoint carries none.
        device: where to run, "cpu" or "cuda"; by default ``MODEL.DEVICE`` among the options, or CUDA if there is any.
        options: alternating keys and values that replace those of the config.

    Raises:
        UserError: a file is missing or unreadable; the checkpoint does not fit the config; or it carries no config and none
            is given, or there are two configs.
    """
    device = device or dict(zip(options[::2], options[1::2])).get("MODEL.DEVICE")
    device = _check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = os.fspath(source)
    if _is_config(source):
        if config_file is not None:
            raise UserError(f"{source} is a config, and {config_file} another: name one.", argument="config_file")
        with _mistakes_in("source"):
            cfg = load_config(source)
        merge_options(cfg, options)
        checkpoint = Checkpoint.read_local(cfg.MODEL.WEIGHTS)
    else:
        path = _download(source) if "://" in source else source
        with _mistakes_in("source"):
            checkpoint = Checkpoint.read_local(path, name="checkpoint")
        carried = checkpoint.config() if checkpoint and config_file is None else None
        cfg = carried if config_file is None else load_config(config_file)
        if cfg is None:
            raise UserError(
                f"{source} carries no config: name the one that it was trained with.", argument="config_file"
            )
        cfg.MODEL.WEIGHTS = path
        merge_options(cfg, options)
        if path != cfg.MODEL.WEIGHTS:  # the options name other weights
            checkpoint = Checkpoint.read_local(cfg.MODEL.WEIGHTS)
    cfg.MODEL.DEVICE = device
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16" and not device.startswith("cuda"):
        logger.warning("SOLVER.AMP.PRECISION float16 needs CUDA: on the CPU, %s runs in float32.", source)
        cfg.SOLVER.AMP.ENABLED = False
    if cfg.MODEL.META_ARCHITECTURE not in SET_DETECTORS:
        known = ", ".join(SET_DETECTORS)
        raise UserError(f"{source} is a {cfg.MODEL.META_ARCHITECTURE}; only these can be loaded here: {known}.")
    check_model(cfg)
    if checkpoint is not None:
        _check_size(cfg, checkpoint)
    model = build_detector(cfg)
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: this model has RANDOM weights. Load a checkpoint instead.")
    # Predict with the weights that training evaluates: the averaged ones, if there are any.
    use_average = cfg.SOLVER.EMA.ENABLED
    CheckedCheckpointer(model, complete=True, use_average=use_average).load(checkpoint or cfg.MODEL.WEIGHTS)
    names, ids = (checkpoint.class_names, checkpoint.category_ids) if checkpoint is not None else (None, None)
    if names is None or ids is None:
        of_dataset, its_ids = _classes_of_dataset(cfg)
        if names is None:
            names, ids = of_dataset, ids or its_ids
        elif of_dataset and its_ids and sorted(of_dataset) == sorted(names):
            ids = [its_ids[index] for index in match_classes(names, of_dataset)]
    return Predictor(cfg, model, class_names or names, ids)


def _check_size(cfg: CfgNode, checkpoint: Checkpoint) -> None:
    """Check that weights fit the model before memory is taken for it, which a damaged config may ask for without bounds."""
    described = cfg.clone()
    described.defrost()
    described.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        shapes = build_detector(described)
    check_fit(checkpoint.path, shapes, checkpoint.weights, complete=True)


def _check_device(device: str | torch.device) -> str:
    device = str(device)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UserError(f"There is no device {device!r}: use cpu or cuda.", argument="device") from error
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device is {device!r}: use cpu or cuda.", argument="device")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device!r}, but there is no CUDA device here: use cpu.", argument="device")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device is {device!r}, but there are {torch.cuda.device_count()} CUDA devices here, numbered from 0.",
            argument="device",
        )
    return device


@contextlib.contextmanager
def _mistakes_in(argument: str):
    """Say of every mistake inside that it is in this argument."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error), argument=argument) from error


def _download(address: str) -> str:
    """Return where a file lies on this machine after it was downloaded.

    Raises:
        UserError: it cannot be.
    """
    try:
        return PathManager.get_local_path(address)
    except Exception as error:  # each kind of address raises its own types
        raise UserError(
            f"{address} cannot be downloaded ({one_line(error)}): correct the address, or name a file on this machine.",
            argument="source",
        ) from error


def _is_config(source: str) -> bool:
    """Return whether a path names a config file (by its ending) rather than a checkpoint."""
    return source.lower().endswith((".yaml", ".yml"))


def _classes_of_dataset(cfg: CfgNode) -> tuple[list[str] | None, list[int] | None]:
    """Return class names and category ids of the config's dataset, or (None, None) if its classes are not known."""
    with contextlib.suppress(UserError):  # its files need not be on this machine
        register_datasets(cfg)
    return classes_by_index((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.MODEL.SAMDETR.NUM_CLASSES)


def list_images(paths: Iterable[str | os.PathLike], suffixes: Iterable[str]) -> list[Path]:
    """List files, and all files below folders that have one of the suffixes; sorted, each once.

    A warning says which files of a folder are left out, but for hidden ones.

    Raises:
        UserError: a path does not exist or cannot be read as a file, or a folder holds no such file.
    """
    files: list[Path] = []
    paths = list(paths)
    if any(not os.fspath(path) for path in paths):
        raise UserError("A path is empty: name a file or a folder.", argument="input")
    for path in map(Path, paths):
        if not path.is_dir():
            with _mistakes_in("input"):
                check_regular_file(path)
            files.append(path)
            continue
        inside = [p for p in files_below(path) if not p.name.startswith(".")]
        found = [p for p in inside if p.suffix.lower() in suffixes and p.is_file()]
        if not found:
            endings = ", ".join(sorted(suffixes))
            raise UserError(f"{path}: the folder holds no file that ends in {endings}.", argument="input")
        if len(found) < len(inside):
            left_out = sorted(set(inside) - set(found))
            some = ", ".join(str(p.relative_to(path)) for p in left_out[:5]) + (", ..." if len(left_out) > 5 else "")
            logger.warning(
                "%s: %d files are left out, since their names do not end as those of images or videos do: %s.",
                *(path, len(left_out), one_line(some)),
            )
        files += found
    return list({file.resolve(): file for file in reversed(files)}.values())[::-1]
