"""Training and evaluation: detectron2's trainer with exact resuming, mixed precision and averaged weights."""

from .evaluation import evaluate_images
from .trainer import Trainer, evaluate

__all__ = ["Trainer", "evaluate", "evaluate_images"]
