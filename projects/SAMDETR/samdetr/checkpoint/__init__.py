"""Checkpoints: what a file holds (``checkpoint.py``), whether it fits a model (``validation.py``), how a run saves and
resumes (``checkpointer.py``), and the authors' published files (``published.py``)."""

from .checkpoint import Checkpoint, describe_run
from .checkpointer import CheckedCheckpointer
from .published import convert_published_state_dict, recognize_published
from .validation import check_fit

__all__ = [
    "CheckedCheckpointer",
    "Checkpoint",
    "check_fit",
    "convert_published_state_dict",
    "describe_run",
    "recognize_published",
]
