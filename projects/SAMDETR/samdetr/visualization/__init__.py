"""Pictures: detections beside the ground truth."""

from .detections import draw_detections_sheet

__all__ = ["draw_detections_sheet"]
