"""Average precision: of each class by COCO's evaluation, and of one ranking of detections."""

import numpy as np

__all__ = ["AP_NAMES", "average_precision", "class_ap"]

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def class_ap(precision: np.ndarray) -> np.ndarray:
    """Return COCO's average precision of each class.

    Args:
        precision: (10 IoU thresholds from 0.5 to 0.95, recall steps, K, 4 areas: all, small, medium, large; limits of
            detections), pycocotools' ``COCOeval.eval["precision"]``, -1 for a class without such objects.

    Returns:
        (K, 6) in percent, in the order of :data:`AP_NAMES`; NaN for a class without such objects. Small objects have an
        area below 32 x 32 pixels, large ones above 96 x 96.
    """
    precision = np.where(precision[..., -1] < 0, np.nan, 100 * precision[..., -1])
    every, at_50, at_75 = precision.mean((0, 1)), precision[0, :, :, 0].mean(0), precision[5, :, :, 0].mean(0)
    return np.stack([every[:, 0], at_50, at_75, every[:, 1], every[:, 2], every[:, 3]], axis=1)


def average_precision(hits: np.ndarray, number: int) -> float:
    """Return the average precision of detections in COCO's way, the mean over 101 steps of recall, in [0, 1].

    Args:
        hits: (D,) bool, in descending order of the scores, whether each detection finds an object.
        number: of objects, 1 or more.
    """
    found = np.cumsum(hits)
    precision = found / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    steps = np.searchsorted(found / number, np.linspace(0, 1, 101), side="left")
    return float(np.append(precision, 0.0)[steps].mean())
