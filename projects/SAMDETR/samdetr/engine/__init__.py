"""Training and evaluation: detectron2's trainer with what a long run needs."""

from .evaluation import evaluate_images
from .trainer import Trainer, evaluate

__all__ = ["Trainer", "evaluate", "evaluate_images"]
