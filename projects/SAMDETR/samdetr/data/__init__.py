"""Data: loaders, augmentation, and the embedded dataset, which importing this folder registers."""

import os

from .build import TrainLoader, build_test_loader, build_train_loader, clean_annotations
from .coco_format import register_coco_format
from .dataset_mapper import DetrDatasetMapper
from .digits import register_digits

__all__ = [
    "DetrDatasetMapper",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "clean_annotations",
    "register_coco_format",
]

# The same root as detectron2's built-in datasets.
register_digits(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
