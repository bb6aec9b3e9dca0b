"""Other detectors, and parts of them, to compare with; importing this folder registers them. See docs/baselines.md."""

from . import anchor_detr, cross_attention, fcos, smca_detr, sparse_rcnn, transformers_detr

__all__ = ["anchor_detr", "cross_attention", "fcos", "smca_detr", "sparse_rcnn", "transformers_detr"]
