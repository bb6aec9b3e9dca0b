"""Other detectors, and parts of them, to compare with; importing this folder registers them. See docs/baselines.md."""

from . import cross_attention, fcos, transformers_detr

__all__ = ["cross_attention", "fcos", "transformers_detr"]
