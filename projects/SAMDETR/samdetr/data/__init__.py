"""Data: loaders, augmentation, and the embedded dataset, which importing this folder registers."""

import os

from .build import TrainLoader, build_test_loader, build_train_loader, resolve_epochs, warn_about_capacity
from .coco_format import read_coco
from .dataset_mapper import DetrDatasetMapper
from .datasets import class_names_of, classes_by_index, clean_annotations, load_records, match_classes, read_dataset
from .digits import register_digits
from .registration import register_coco_format, register_datasets
from .voc_format import read_voc
from .yolo_format import read_yolo

__all__ = [
    "DetrDatasetMapper",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "class_names_of",
    "classes_by_index",
    "clean_annotations",
    "load_records",
    "match_classes",
    "read_coco",
    "read_dataset",
    "read_voc",
    "read_yolo",
    "register_coco_format",
    "register_datasets",
    "resolve_epochs",
    "warn_about_capacity",
]

# The same root as detectron2's built-in datasets.
register_digits(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
