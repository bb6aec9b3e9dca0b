"""DETR's training augmentation, for detectron2's dataset mapper."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..errors import UserError
from .images import log_once, open_picture

__all__ = ["DetrDatasetMapper", "build_train_augmentation"]


class RandomApply(T.RandomApply):
    """detectron2's ``RandomApply``, whose text in the log says what it applies."""

    def __repr__(self):
        return f"RandomApply({self.aug}, prob={self.prob})"

    __str__ = __repr__


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's ``ResizeShortestEdge``, which keeps at least one pixel per side of a long thin image."""

    def get_transform(self, image):
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def build_train_augmentation(cfg) -> list[T.Augmentation]:
    """Build DETR's augmentation: flip; with probability ``INPUT.DETR_CROP.PROB`` resize and crop; then resize.

    So an image is either resized, or resized, cropped and resized again.
    """
    augmentation: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentation.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    crop = cfg.INPUT.DETR_CROP
    if crop.PROB > 0:
        resize_and_crop = T.AugmentationList(
            [
                ResizeShortestEdge(list(crop.MIN_SIZE), sample_style="choice"),
                T.RandomCrop("absolute_range", list(crop.SIZE)),
            ]
        )
        augmentation.append(RandomApply(resize_and_crop, prob=crop.PROB))
    augmentation.append(
        ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    )
    return augmentation


class DetrDatasetMapper(DatasetMapper):
    """detectron2's mapper for boxes, with :func:`build_train_augmentation` in training; it logs what it applies.

    Pictures are read by :func:`samdetr.data.images.open_picture`. Boxes are clipped to the cropped image, and dropped if
    nothing is left. An image may end up without boxes.
    """

    @configurable
    def __init__(self, *args, max_pixels: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if cfg.INPUT.CROP.ENABLED:
            raise UserError("INPUT.CROP.ENABLED has no effect here: set it to False and use INPUT.DETR_CROP.")
        arguments = super().from_config(cfg, is_train)
        if is_train:
            arguments["augmentations"] = build_train_augmentation(cfg)
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
        pixels = picture.pixels[:, :, ::-1] if self.image_format == "BGR" else picture.pixels
        augmented = T.AugInput(pixels)
        transforms = self.augmentations(augmented)
        result["image"] = torch.as_tensor(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))
        if not self.is_train:
            result.pop("annotations", None)
        elif "annotations" in result:
            self._transform_annotations(result, transforms, augmented.image.shape[:2])
        return result
