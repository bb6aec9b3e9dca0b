"""detectron2's dataset mapper for boxes, with DETR's augmentation."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..errors import UserError
from .augmentation import ResizeShortestEdge, build_train_augmentation
from .images import log_once, open_picture

__all__ = ["DetrDatasetMapper"]


class DetrDatasetMapper(DatasetMapper):
    """detectron2's mapper for boxes; it logs the augmentation that it applies.

    In training that is :func:`samdetr.data.augmentation.build_train_augmentation`, all of it if ``strong``. Pictures are read
    by :func:`samdetr.data.images.open_picture`. Boxes are clipped to the cropped image, and dropped if
    nothing is left. An image may end up without boxes.
    """

    @configurable
    def __init__(self, *args, max_pixels: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg, is_train: bool = True, *, strong: bool = True):
        if cfg.INPUT.CROP.ENABLED:
            raise UserError("INPUT.CROP.ENABLED has no effect here: set it to False and use INPUT.DETR_CROP.")
        arguments = super().from_config(cfg, is_train)
        if is_train:
            arguments["augmentations"] = build_train_augmentation(cfg, strong=strong)
        else:
            arguments["augmentations"] = [ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)]
        return {**arguments, "max_pixels": cfg.INPUT.MAX_PIXELS}

    def __call__(self, dataset_dict: dict) -> dict:
        """Turn a record in detectron2's standard format into the model's input.

        Raises:
            UserError: the picture cannot be used; the message names it.
        """
        result = copy.deepcopy(dataset_dict)
        size = (result["width"], result["height"]) if {"width", "height"} <= result.keys() else None
        picture = open_picture(result["file_name"], annotated_size=size, max_pixels=self.max_pixels)
        for note in picture.notes:
            log_once(note, result["file_name"])
        result["width"], result["height"] = picture.size
        augmented = T.AugInput(picture.pixels)
        transforms = self.augmentations(augmented)
        pixels = augmented.image[:, :, ::-1] if self.image_format == "BGR" else augmented.image
        result["image"] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        if not self.is_train:
            result.pop("annotations", None)
        elif "annotations" in result:
            self._transform_annotations(result, transforms, augmented.image.shape[:2])
        return result
