"""Checkpoints: what a file holds (``checkpoint.py``), whether it fits a model (``validation.py``), how a run saves and
resumes (``checkpointer.py``), the authors' published files (``published.py``), and those of ``transformers``
(``transformers_format.py``)."""

from .checkpoint import Checkpoint, describe_run
from .checkpointer import CheckedCheckpointer
from .published import convert_published_state_dict, recognize_published
from .transformers_format import convert_transformers_state_dict
from .validation import check_fit

__all__ = [
    "CheckedCheckpointer",
    "Checkpoint",
    "check_fit",
    "convert_published_state_dict",
    "convert_transformers_state_dict",
    "describe_run",
    "recognize_published",
]
