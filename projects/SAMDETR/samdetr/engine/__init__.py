"""Training: detectron2's trainer with what a long run needs."""

from .trainer import Trainer, evaluate

__all__ = ["Trainer", "evaluate"]
