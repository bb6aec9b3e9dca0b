"""SAM-DETR++ for detectron2. Importing this package registers everything; see the project's README."""

from . import backbone, baseline_attention, checkpoint, data, fcos, solver
from .config import add_samdetr_config
from .cross_attention import CROSS_ATTENTION_REGISTRY
from .encoder import ENCODER_REGISTRY
from .meta_arch import SAMDETR
from .predictor import Predictor, load
from .query_generator import QUERY_GENERATOR_REGISTRY
from .semantics_aligner import SEMANTICS_ALIGNER_REGISTRY

__version__ = "0.1.0"

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "ENCODER_REGISTRY",
    "QUERY_GENERATOR_REGISTRY",
    "SAMDETR",
    "SEMANTICS_ALIGNER_REGISTRY",
    "Predictor",
    "add_samdetr_config",
    "backbone",
    "baseline_attention",
    "checkpoint",
    "data",
    "fcos",
    "load",
    "solver",
]
