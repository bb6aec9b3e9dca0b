"""Register datasets that this project reads in detectron2's catalogs: from the config's keys, or by name and reader."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..errors import UserError
from .coco_format import CocoAnnotations, read_coco
from .voc_format import read_voc, voc_list
from .yolo_format import read_yolo, yolo_root

__all__ = ["AnnotationSource", "register_coco_format", "register_datasets", "register_source"]


class AnnotationSource:
    """A dataset in detectron2's catalog whose annotations this project reads; the catalog calls it to load the dataset."""

    def __init__(self, path: str, image_root: str, read: Callable[[], CocoAnnotations]):
        """
        Args:
            path: of the file that the dataset is known by.
            image_root: the folder of the images.
            read: reads the annotations; a dataset that has not changed should be read once.
        """
        self.path = path
        self.image_root = image_root
        self.read = read

    def __call__(self) -> list[dict]:
        return self.read().records()


def register_source(
    source: AnnotationSource, name: str, class_names: Sequence[str], category_ids: Sequence[int]
) -> None:
    """Register a dataset, with the names and ids of its classes, in detectron2's catalogs."""
    DatasetCatalog.register(name, source)
    MetadataCatalog.get(name).set(
        json_file=source.path,
        image_root=source.image_root,
        evaluator_type="coco",
        thing_classes=list(class_names),
        thing_dataset_id_to_contiguous_id={number: index for index, number in enumerate(category_ids)},
    )


def register_datasets(cfg) -> None:
    """Register the datasets of ``DATASETS.COCO_FORMAT``, ``VOC_FORMAT`` and ``YOLO_FORMAT``. Calling it twice is harmless.

    Class names come from the annotations. A relative path that does not exist is looked for below ``$DETECTRON2_DATASETS``,
    like detectron2's own datasets.

    Raises:
        UserError: an entry has another form, the name belongs to another dataset, a file or folder does not exist, or the
            annotations cannot be used.
    """
    register_coco_format(cfg)
    for name, folder, split in _entries(cfg, "VOC_FORMAT", "[name, folder, split]"):
        folder = _find(folder, f"DATASETS.VOC_FORMAT: {name}'s folder")
        read = partial(read_voc, folder, split)
        source = AnnotationSource(str(voc_list(folder, split)), str(Path(folder, "JPEGImages")), read)
        _register("VOC_FORMAT", name, source)
    for name, file, split in _entries(cfg, "YOLO_FORMAT", "[name, data.yaml, split]"):
        file = _find(file, f"DATASETS.YOLO_FORMAT: {name}'s file")
        try:
            root = str(yolo_root(file))
        except UserError as error:
            raise UserError(f"DATASETS.YOLO_FORMAT: {error}") from error
        _register("YOLO_FORMAT", name, AnnotationSource(file, root, partial(read_yolo, file, split)), split)


def register_coco_format(cfg) -> None:
    """Register the datasets of ``DATASETS.COCO_FORMAT`` alone; see :func:`register_datasets`."""
    for name, file, folder in _entries(cfg, "COCO_FORMAT", "[name, annotation file, image folder]"):
        file = _find(file, f"DATASETS.COCO_FORMAT: {name}'s annotation file")
        folder = _find(folder, f"DATASETS.COCO_FORMAT: {name}'s image folder")
        _register("COCO_FORMAT", name, AnnotationSource(file, folder, partial(read_coco, file, folder)))


def _entries(cfg, key: str, form: str) -> list[tuple[str, str, str]]:
    entries = cfg.DATASETS[key]
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise UserError(f"DATASETS.{key} has the entry {entry!r}: each is {form}.")
    return [tuple(entry) for entry in entries]


def _find(path: str, what: str) -> str:
    """Return a path as it is or, if it is only there, below ``$DETECTRON2_DATASETS``."""
    if "://" in path:
        raise UserError(f"{what} {path} is an address: download it, and name the path.")
    if os.path.exists(path):
        return path
    below = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), path)
    if os.path.exists(below):
        return below
    raise UserError(f"{what} {path} does not exist (looked in {os.getcwd()}, and for {below}).")


def _register(key: str, name: str, source: AnnotationSource, split: str | None = None) -> None:
    """Register one entry of the config, after its annotations were read."""
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        known = [metadata.get(field) for field in ("json_file", "image_root", "split")]
        if known != [source.path, source.image_root, split]:
            raise UserError(f"DATASETS.{key}: the name {name!r} belongs to {known[:2]}: choose another.")
        return
    try:
        annotations = source.read()
        # Not every use needs the images.
        annotations.report.refuse_errors(annotations.path, except_for="images missing")
    except UserError as error:
        raise UserError(f"DATASETS.{key}: {error}") from error
    register_source(source, name, annotations.class_names, annotations.category_ids)
    if split is not None:
        MetadataCatalog.get(name).set(split=split)
