"""SAM-DETR++ for detectron2. Importing this package registers everything; see the project's README.

import samdetr
predictor = samdetr.load("model_final.pth")     # detect with a trained model
cfg = samdetr.load_config("sam_detr_R_50_1x")   # one of this project's configs, or a path
samdetr.add_samdetr_config(cfg)                 # in other detectron2 code: add the MODEL.SAMDETR node
"""

import warnings

from .about import INSTALL_DETECTRON2, __version__

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # fvcore's and its own, about torch.jit
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "detectron2":
        raise
    raise ModuleNotFoundError(f"samdetr needs detectron2. This line brings it: {INSTALL_DETECTRON2}") from error

from . import checkpoint, data
from .config import add_samdetr_config, load_config
from .engine import Trainer
from .errors import UserError
from .modeling import (
    CROSS_ATTENTION_REGISTRY,
    ENCODER_REGISTRY,
    QUERY_GENERATOR_REGISTRY,
    SAMDETR,
    SEMANTICS_ALIGNER_REGISTRY,
    AlignedQuery,
    FeatureLevel,
)
from .predictor import Predictor, load

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "ENCODER_REGISTRY",
    "QUERY_GENERATOR_REGISTRY",
    "SAMDETR",
    "SEMANTICS_ALIGNER_REGISTRY",
    "AlignedQuery",
    "FeatureLevel",
    "Predictor",
    "Trainer",
    "UserError",
    "__version__",
    "add_samdetr_config",
    "checkpoint",
    "data",
    "load",
    "load_config",
]
