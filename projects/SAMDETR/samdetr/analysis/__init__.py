"""Analyse detections: confusion, kinds of errors, score thresholds. NumPy over COCO's formats; no model is needed."""

from .confusion import confusion_matrix
from .errors import ERROR_KINDS, ErrorSplit, error_costs, split_errors
from .matching import DetectionResults, Matches, match, overlaps, read_results
from .precision import AP_NAMES, average_precision, class_ap
from .thresholds import ThresholdCurves, threshold_curves

__all__ = [
    "AP_NAMES",
    "ERROR_KINDS",
    "DetectionResults",
    "ErrorSplit",
    "Matches",
    "ThresholdCurves",
    "average_precision",
    "class_ap",
    "confusion_matrix",
    "error_costs",
    "match",
    "overlaps",
    "read_results",
    "split_errors",
    "threshold_curves",
]
