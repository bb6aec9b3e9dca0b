"""What kinds of errors cost how much AP, as published for TIDE (Bolya et al., "TIDE: A General Toolbox for Identifying Object
Detection Errors", 2020, section 2).
"""

from dataclasses import dataclass

import numpy as np

from .matching import DetectionResults, match, overlaps
from .precision import average_precision

__all__ = ["ERROR_KINDS", "ErrorSplit", "error_costs", "split_errors"]

ERROR_KINDS = {
    "classification": "wrong class, IoU of 0.5 or more",
    "localisation": "right class, IoU from 0.1 to 0.5",
    "both": "wrong class, IoU from 0.1 to 0.5",
    "duplicate": "right class, IoU of 0.5 or more, of an object that is found with a higher score",
    "background": "no object with an IoU of 0.1 or more",
    "missed": "an object that no detection finds, mislocates or misclassifies",
}


@dataclass
class ErrorSplit:
    """Exactly one kind for each detection and each object.

    Attributes:
        detection_kinds: (D,) str, "correct", "ignored" (in a crowd region), or one of :data:`ERROR_KINDS` but "missed".
        about: (D,) int, the object that a detection finds, or that it overlaps most of those that make it this kind of
            error; -1 for "ignored" and "background".
        object_kinds: (N,) str, "found", "crowd", "missed", or "mistaken" for an object that nothing finds but that a
            localisation or classification error is about, so that correcting this error also finds the object.
    """

    detection_kinds: np.ndarray
    about: np.ndarray
    object_kinds: np.ndarray

    def counts(self) -> dict[str, int]:
        """Return the number of errors of each kind."""
        kinds = np.concatenate([self.detection_kinds, self.object_kinds])
        return {kind: int((kinds == kind).sum()) for kind in ERROR_KINDS}


def split_errors(results: DetectionResults, foreground: float = 0.5, background: float = 0.1) -> ErrorSplit:
    """Name what is wrong with each false positive and each object that is not found.

    Args:
        results: objects and detections; an error's kind does not depend on detections with lower scores, "missed" does.
        foreground: IoU from which on a detection finds an object.
        background: IoU below which a detection has nothing to do with an object.
    """
    matches = match(results, foreground)
    kinds = np.full(len(results.scores), "", "<U16")
    kinds[matches.objects >= 0], kinds[matches.ignored] = "correct", "ignored"
    about = matches.objects.copy()
    for detections, objects, iou in overlaps(results):
        wrong = kinds[detections] == ""
        named = _name_errors(results, detections[wrong], objects, iou[wrong], foreground, background)
        kinds[detections[wrong]], about[detections[wrong]] = named
    object_kinds = np.full(len(results.object_class), "missed", "<U16")
    object_kinds[about[np.isin(kinds, ("localisation", "classification"))]] = "mistaken"
    object_kinds[matches.objects[matches.objects >= 0]] = "found"
    object_kinds[results.crowd] = "crowd"
    return ErrorSplit(kinds, about, object_kinds)


def _name_errors(
    results: DetectionResults,
    detections: np.ndarray,
    objects: np.ndarray,
    iou: np.ndarray,
    foreground: float,
    background: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the kind of each false positive of an image, and the object that it is about.

    Args:
        results, foreground, background: see :func:`split_errors`.
        detections: (d,) int, the false positives.
        objects: (n,) int, the image's objects.
        iou: (d, n), of these.
    """
    iou = np.where(results.crowd[objects], 0, iou)
    same = results.detection_class[detections][:, None] == results.object_class[objects]
    # In a last column, no object, for images without any.
    objects = np.append(objects, -1)
    own, other = (np.pad(np.where(which, iou, 0), ((0, 0), (0, 1))) for which in (same, ~same))
    own_iou, own_object = own.max(1), objects[own.argmax(1)]
    other_iou, other_object = other.max(1), objects[other.argmax(1)]
    cases = {  # in this order, where objects of its own and of other classes make several of them true
        "localisation": ((own_iou >= background) & (own_iou < foreground), own_object),
        "classification": (other_iou >= foreground, other_object),
        "duplicate": (own_iou >= foreground, own_object),
        "background": (np.maximum(own_iou, other_iou) < background, -1),
    }
    conditions = [condition for condition, _ in cases.values()]
    about = np.select(conditions, [chosen for _, chosen in cases.values()], other_object)
    return np.select(conditions, list(cases), "both"), about


def error_costs(results: DetectionResults, split: ErrorSplit) -> tuple[float, dict[str, float]]:
    """Return AP at the split's foreground IoU, and dAP of each kind: how much higher AP is with these errors, alone, corrected.

    A classification or localisation error becomes a true positive of its object, of whose detections only the one with the
    highest score is kept; other false positives are removed; missed objects are not counted. dAPs do not add up to what is
    lacking to 100, since an error may hide another one.

    Args:
        results: all detections, whatever their scores.
        split: of the same results, from :func:`split_errors`.

    Returns:
        In percent; NaN if there are no objects, or none are left once those missed are not counted.
    """
    numbers = results.object_counts()
    kinds, labels = split.detection_kinds, results.detection_class
    hits, counted = kinds == "correct", kinds != "ignored"
    ap = _mean_ap(labels[counted], hits[counted], numbers)
    costs = {}
    for kind in ERROR_KINDS:
        wrong = kinds == kind
        if kind == "missed":
            missed = results.object_class[split.object_kinds == kind]
            corrected = _mean_ap(labels[counted], hits[counted], numbers - np.bincount(missed, minlength=len(numbers)))
        elif kind in ("localisation", "classification"):
            right = np.flatnonzero(hits | wrong)
            _, best = np.unique(split.about[right], return_index=True)  # the first, which has the highest score
            suppressed = np.isin(np.arange(len(kinds)), np.delete(right, best))
            new_labels = np.where(wrong, np.append(results.object_class, -1)[split.about], labels)
            kept = counted & ~suppressed
            corrected = _mean_ap(new_labels[kept], (hits | wrong)[kept], numbers)
        else:
            corrected = _mean_ap(labels[counted & ~wrong], hits[counted & ~wrong], numbers)
        costs[kind] = corrected - ap
    return ap, costs


def _mean_ap(labels: np.ndarray, hits: np.ndarray, numbers: np.ndarray) -> float:
    """Return the mean over classes that have objects, in percent; NaN if none has."""
    by_class = [average_precision(hits[labels == label], numbers[label]) for label in np.flatnonzero(numbers)]
    return 100 * float(np.mean(by_class)) if by_class else float("nan")
