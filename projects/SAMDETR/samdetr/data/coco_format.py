"""Register COCO-format datasets that a config names, so that no Python is needed for them."""

import json
import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from ..errors import UserError

__all__ = ["read_class_names", "register_coco_format"]


def read_class_names(json_file: str) -> list[str]:
    """Return the class names in a COCO-format annotation file, in the order of their ids.

    Raises:
        UserError: the file is not in COCO's format.
    """
    with PathManager.open(json_file) as f:
        try:
            categories = json.load(f)["categories"]
            return [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{json_file} is not in COCO\'s format ({type(error).__name__}: {error}): it needs "images", '
                '"annotations" and "categories", each category with "id" and "name".'
            ) from error


def register_coco_format(cfg) -> None:
    """Register the datasets of ``cfg.DATASETS.COCO_FORMAT``. Calling it twice is harmless.

    Args:
        cfg: each entry is (name, annotation file, image folder); class names come from the file's ``categories``.

    Raises:
        UserError: an entry has another form, the name belongs to another dataset, or a file or folder does not exist.
    """
    for entry in cfg.DATASETS.COCO_FORMAT:
        if len(entry) != 3 or not all(isinstance(part, str) for part in entry):
            raise UserError(
                f"DATASETS.COCO_FORMAT has the entry {entry!r}: each is [name, annotation file, image folder]."
            )
        name, json_file, image_root = entry
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name).get("json_file")
            if known != json_file:
                raise UserError(f"DATASETS.COCO_FORMAT: the name {name!r} belongs to {known}: choose another.")
            continue
        if not PathManager.isfile(json_file):
            raise UserError(
                f"DATASETS.COCO_FORMAT: {name}'s annotation file {json_file} does not exist (looked in {os.getcwd()})."
            )
        if not PathManager.isdir(image_root):
            raise UserError(
                f"DATASETS.COCO_FORMAT: {name}'s image folder {image_root} does not exist (looked in {os.getcwd()})."
            )
        try:
            names = read_class_names(json_file)
        except UserError as error:
            raise UserError(f"DATASETS.COCO_FORMAT: {error}") from error
        register_coco_instances(name, {"thing_classes": names}, json_file, image_root)
