"""Augmentation of one training image: DETR's flip, crop and resizing, and by key photometric change and large-scale jitter.

What mixes several images is in ``mixing.py``.
"""

import random

from detectron2.data import transforms as T
from PIL import Image

__all__ = ["LargeScaleJitter", "build_train_augmentation", "resize_and_crop"]


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


def resize_and_crop(size: tuple[int, int], new_size: tuple[int, int], crop: tuple[int, int]) -> T.TransformList:
    """Return what resizes an image and cuts out ``crop`` at a random place; sizes are (height, width)."""
    top, left = (random.randint(0, new - cut) for new, cut in zip(new_size, crop))
    return T.TransformList(
        [
            T.ResizeTransform(*size, *new_size, Image.BILINEAR),
            T.CropTransform(left, top, crop[1], crop[0], new_size[1], new_size[0]),
        ]
    )


class LargeScaleJitter(T.Augmentation):
    """Resize to a random multiple of the usual size, and crop what is then larger than that, at a random place.

    Smaller images stay as they are: the model pads batches itself. Source: Ghiasi et al., Simple Copy-Paste, CVPR 2021.
    """

    def __init__(self, resize: T.Augmentation, scale: tuple[float, float]):
        """
        Args:
            resize: makes images of the usual size; draws that size if it is random.
            scale: the smallest and the largest multiple.
        """
        super().__init__()
        self._init({"resize": resize, "scale": tuple(scale)})

    def get_transform(self, image):
        height, width = image.shape[:2]
        usual = self.resize.get_transform(image)
        usual_height, usual_width = (
            (usual.new_h, usual.new_w) if isinstance(usual, T.ResizeTransform) else (height, width)
        )
        factor = random.uniform(*self.scale)
        new_height, new_width = max(1, round(usual_height * factor)), max(1, round(usual_width * factor))
        crop = min(new_height, usual_height), min(new_width, usual_width)
        return resize_and_crop((height, width), (new_height, new_width), crop)


def build_train_augmentation(cfg, *, strong: bool = True) -> list[T.Augmentation]:
    """Build the augmentation of single images, for images in RGB.

    It is DETR's: flip; with probability ``INPUT.DETR_CROP.PROB`` resize and crop; then resize. So an image is either resized,
    or resized, cropped and resized again.

    Args:
        cfg: the full config.
        strong: whether to add what ``INPUT.PHOTOMETRIC`` and ``INPUT.LARGE_SCALE_JITTER`` ask for.
    """
    augmentation: list[T.Augmentation] = []
    if cfg.INPUT.RANDOM_FLIP != "none":
        horizontal = cfg.INPUT.RANDOM_FLIP == "horizontal"
        augmentation.append(T.RandomFlip(horizontal=horizontal, vertical=not horizontal))
    photometric = cfg.INPUT.PHOTOMETRIC
    if strong and photometric.PROB > 0:
        limits = 1 - photometric.STRENGTH, 1 + photometric.STRENGTH
        change = [T.RandomBrightness(*limits), T.RandomContrast(*limits), T.RandomSaturation(*limits)]
        augmentation.append(RandomApply(T.AugmentationList(change), prob=photometric.PROB))
    crop = cfg.INPUT.DETR_CROP
    if crop.PROB > 0:
        crop_augmentation = T.AugmentationList(
            [
                ResizeShortestEdge(list(crop.MIN_SIZE), sample_style="choice"),
                T.RandomCrop("absolute_range", list(crop.SIZE)),
            ]
        )
        augmentation.append(RandomApply(crop_augmentation, prob=crop.PROB))
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    jitter = cfg.INPUT.LARGE_SCALE_JITTER
    if strong and jitter.ENABLED:
        augmentation.append(LargeScaleJitter(resize, jitter.SCALE))
    else:
        augmentation.append(resize)
    return augmentation
