"""DETR's training augmentation, for detectron2's dataset mapper."""

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..errors import UserError

__all__ = ["DetrDatasetMapper", "build_train_augmentation"]


class RandomApply(T.RandomApply):
    """detectron2's ``RandomApply``, whose text in the log says what it applies."""

    def __repr__(self):
        return f"RandomApply({self.aug}, prob={self.prob})"

    __str__ = __repr__


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
                T.ResizeShortestEdge(list(crop.MIN_SIZE), sample_style="choice"),
                T.RandomCrop("absolute_range", list(crop.SIZE)),
            ]
        )
        augmentation.append(RandomApply(resize_and_crop, prob=crop.PROB))
    augmentation.append(
        T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING)
    )
    return augmentation


class DetrDatasetMapper(DatasetMapper):
    """detectron2's mapper with :func:`build_train_augmentation` in training; it logs what it applies.

    Boxes are clipped to the cropped image, and dropped if nothing is left. An image may end up without boxes.
    """

    @classmethod
    def from_config(cls, cfg, is_train: bool = True):
        if cfg.INPUT.CROP.ENABLED:
            raise UserError("INPUT.CROP.ENABLED has no effect here: set it to False and use INPUT.DETR_CROP.")
        arguments = super().from_config(cfg, is_train)
        if is_train:
            arguments["augmentations"] = build_train_augmentation(cfg)
        return arguments
