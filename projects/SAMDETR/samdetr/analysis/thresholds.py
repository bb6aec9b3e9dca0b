"""What a score threshold does to precision and recall."""

from dataclasses import dataclass

import numpy as np

from .matching import DetectionResults, match

__all__ = ["ThresholdCurves", "threshold_curves"]

_STEPS = 201  # thresholds, from 0 to 1


@dataclass
class ThresholdCurves:
    """Precision, recall and F1 by score threshold, of each class and, in the last row, of all detections and objects.

    Attributes:
        thresholds: (T,) in [0, 1].
        precision: (K + 1, T) in [0, 1]; NaN where no detection has such a score.
        recall: (K + 1, T) in [0, 1]; NaN for a class without objects.
        f1: (K + 1, T) in [0, 1]; NaN where there are neither detections nor objects.
        best: (K + 1,) int, the index of the lowest threshold with the best F1; -1 if nothing is found at any threshold.
    """

    thresholds: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best: np.ndarray


def threshold_curves(results: DetectionResults, iou_threshold: float = 0.5) -> ThresholdCurves:
    """Return precision, recall and F1 of each class by score threshold; see :func:`match` for what is found."""
    matches = match(results, iou_threshold)
    thresholds = np.linspace(0, 1, _STEPS)
    classes = len(results.class_names)
    detected, found = np.zeros((2, classes + 1, _STEPS), int)
    for label in range(classes):
        counted = (results.detection_class == label) & ~matches.ignored
        detected[label] = np.searchsorted(-results.scores[counted], -thresholds, side="right")
        found[label] = np.append(0, np.cumsum(matches.objects[counted] >= 0))[detected[label]]
    detected[-1], found[-1] = detected.sum(0), found.sum(0)
    objects = results.object_counts()
    objects = np.append(objects, objects.sum())[:, None]
    with np.errstate(invalid="ignore"):
        precision, recall, f1 = found / detected, found / objects, 2 * found / (detected + objects)
    best = np.where(found.any(1), np.nan_to_num(f1).argmax(1), -1)
    return ThresholdCurves(thresholds, precision, recall, f1, best)
