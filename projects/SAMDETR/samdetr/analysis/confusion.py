"""Which class is taken for which."""

import numpy as np

from .matching import DetectionResults, greatest, match, overlaps

__all__ = ["confusion_matrix"]


def confusion_matrix(results: DetectionResults, score_threshold: float, iou_threshold: float = 0.5) -> np.ndarray:
    """Count as which class the objects of each class are detected.

    First, detections find objects of their class as in :func:`match`, so that the diagonal holds the true positives that
    precision and recall count. Then those that are left find, in the order of their scores, the object of another class that
    they overlap most of those that are left.

    Args:
        results: objects and detections.
        score_threshold: detections with a lower score do not count.
        iou_threshold: from which on a detection finds an object.

    Returns:
        (K + 1, K + 1) int. Rows are ground truth, the last one is background; columns are detections, the last one is for
        missed objects. A row of a class sums up to its objects, a column to its detections. Crowd regions and detections in
        those of their class are left out.
    """
    results = results.above(score_threshold)
    matches = match(results, iou_threshold)
    found = matches.objects.copy()
    free = ~matches.found(len(results.object_class)) & ~results.crowd
    for detections, objects, iou in overlaps(results):
        for detection, row in zip(detections, iou):
            if found[detection] < 0 and not matches.ignored[detection]:
                chosen = greatest(row, (row >= iou_threshold) & free[objects])
                if chosen >= 0:
                    found[detection] = objects[chosen]
                    free[objects[chosen]] = False
    classes = len(results.class_names)
    table = np.zeros((classes + 1, classes + 1), int)
    counted = ~matches.ignored
    rows = np.append(results.object_class, classes)[found[counted]]  # -1, nothing found: background
    np.add.at(table, (rows, results.detection_class[counted]), 1)
    np.add.at(table, (results.object_class[free], classes), 1)
    return table
