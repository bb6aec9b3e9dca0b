"""Augmentation that mixes several training images: mosaic and mixup.

Samples are what the dataset mapper returns: ``image``, a uint8 tensor (3, H, W), and ``instances``, whose ``gt_boxes`` are
corners in pixels of that image. A mixed sample keeps the size, the file's name and all else of the first one.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from .augmentation import resize_and_crop

__all__ = ["Mixing", "mixup", "mosaic"]


def _cover(sample: dict, height: int, width: int) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Resize a sample, as little as covers ``height`` x ``width``, and crop that at a random place.

    Returns:
        pixels (height, width, 3), the corners (N, 4) of the boxes of which something is left, their classes (N,).
    """
    pixels = sample["image"].permute(1, 2, 0).numpy()
    old_height, old_width = pixels.shape[:2]
    factor = max(height / old_height, width / old_width)
    new_size = max(height, round(old_height * factor)), max(width, round(old_width * factor))
    transforms = resize_and_crop((old_height, old_width), new_size, (height, width))
    instances = sample["instances"]
    corners = transforms.apply_box(instances.gt_boxes.tensor.numpy()).reshape(-1, 4)
    corners = corners.clip(0, [width, height, width, height])
    kept = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    return transforms.apply_image(pixels), corners[kept], instances.gt_classes[torch.from_numpy(kept)]


def _sample(first: dict, pixels: np.ndarray, corners: Sequence[np.ndarray], classes: Sequence[torch.Tensor]) -> dict:
    instances = Instances(pixels.shape[:2])
    instances.gt_boxes = Boxes(torch.as_tensor(np.concatenate(corners), dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.cat(list(classes))
    return {**first, "image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "instances": instances}


def mosaic(samples: Sequence[dict]) -> dict:
    """Show four samples in the four parts into which a random point of its middle divides the first one's area.

    Each is resized and cropped to its part, so that nothing is empty. Source: Bochkovskiy et al., YOLOv4, 2020.
    """
    height, width = samples[0]["image"].shape[1:]
    row, column = round(height * random.uniform(0.3, 0.7)), round(width * random.uniform(0.3, 0.7))
    canvas = np.empty((height, width, 3), np.uint8)
    corners, classes = [], []
    parts = [(0, 0, row, column), (0, column, row, width), (row, 0, height, column), (row, column, height, width)]
    for sample, (top, left, bottom, right) in zip(samples, parts):
        if bottom > top and right > left:  # not so in images of one row or column
            part, boxes, labels = _cover(sample, bottom - top, right - left)
            canvas[top:bottom, left:right] = part
            corners.append(boxes + np.array([left, top, left, top]))
            classes.append(labels)
    return _sample(samples[0], canvas, corners, classes)


def mixup(first: dict, second: dict) -> dict:
    """Blend two samples, 40 to 60 % of the first one; all boxes of both are there to be found.

    The second one is resized and cropped to the first one's size. Source: Zhang et al., Bag of Freebies for Training Object
    Detection Neural Networks, 2019.
    """
    height, width = first["image"].shape[1:]
    pixels, corners, classes = _cover(second, height, width)
    share = random.uniform(0.4, 0.6)
    blended = share * first["image"].permute(1, 2, 0).numpy() + (1 - share) * pixels
    own = first["instances"]
    boxes = [own.gt_boxes.tensor.numpy(), corners]
    return _sample(first, blended.round().astype(np.uint8), boxes, [own.gt_classes, classes])


class Mixing:
    """Mix a sample with others, with given probabilities: mosaic first, then mixup."""

    def __init__(self, *, mosaic_prob: float, mixup_prob: float):
        self.mosaic_prob = mosaic_prob
        self.mixup_prob = mixup_prob

    @property
    def most_images(self) -> int:
        """The largest number of images that show in one sample."""
        return (4 if self.mosaic_prob > 0 else 1) + (1 if self.mixup_prob > 0 else 0)

    def __call__(self, sample: dict, draw: Callable[[], dict]) -> dict:
        """Return the sample, mixed or not; ``draw`` returns another one."""
        if random.random() < self.mosaic_prob:
            sample = mosaic([sample, draw(), draw(), draw()])
        if random.random() < self.mixup_prob:
            sample = mixup(sample, draw())
        return sample

    def __repr__(self):
        return f"Mixing(mosaic_prob={self.mosaic_prob}, mixup_prob={self.mixup_prob})"
