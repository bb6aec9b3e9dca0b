"""Data: loaders, augmentation, and the embedded dataset, which importing this folder registers."""

import os

from .build import TrainLoader, build_test_loader, build_train_loader, warn_about_capacity
from .coco_format import read_coco, register_coco_format
from .dataset_mapper import DetrDatasetMapper
from .datasets import class_names_of, clean_annotations, load_records, match_classes, read_dataset
from .digits import register_digits

__all__ = [
    "DetrDatasetMapper",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "class_names_of",
    "clean_annotations",
    "load_records",
    "match_classes",
    "read_coco",
    "read_dataset",
    "register_coco_format",
    "warn_about_capacity",
]

# The same root as detectron2's built-in datasets.
register_digits(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
