"""The paper's model. Start reading at ``meta_arch.py``; importing this folder registers every part.

``meta_arch`` runs ``backbone``, ``feature_projection``, ``encoder``, ``query_generator`` and ``decoder``. Each decoder layer
has a ``semantics_aligner`` and a ``cross_attention``. ``criterion`` and ``matcher`` make the loss, ``postprocessing`` the
detections. ``structures`` defines what the parts exchange, with the glossary of shapes. ``baselines/`` holds other
detectors and parts of them.
"""

from . import backbone, baselines, timm_backbone
from .cross_attention import CROSS_ATTENTION_REGISTRY
from .encoder import ENCODER_REGISTRY
from .meta_arch import SAMDETR
from .query_generator import QUERY_GENERATOR_REGISTRY
from .semantics_aligner import SEMANTICS_ALIGNER_REGISTRY
from .structures import AlignedQuery, FeatureLevel

__all__ = [
    "CROSS_ATTENTION_REGISTRY",
    "ENCODER_REGISTRY",
    "QUERY_GENERATOR_REGISTRY",
    "SAMDETR",
    "SEMANTICS_ALIGNER_REGISTRY",
    "AlignedQuery",
    "FeatureLevel",
    "backbone",
    "baselines",
    "timm_backbone",
]
