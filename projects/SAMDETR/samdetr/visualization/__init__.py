"""Draw detections, ground truth, attention and training curves."""

from .attention import RecordedLayer, draw_attention, draw_head, record_attention
from .curves import draw_curves, published_curves, published_names, read_metrics
from .detections import draw_annotations, draw_beside_truth, draw_detections, draw_pairs
from .report import analysis_sections, report_page

__all__ = [
    "RecordedLayer",
    "analysis_sections",
    "draw_annotations",
    "draw_attention",
    "draw_beside_truth",
    "draw_curves",
    "draw_detections",
    "draw_head",
    "draw_pairs",
    "published_curves",
    "published_names",
    "read_metrics",
    "record_attention",
    "report_page",
]
