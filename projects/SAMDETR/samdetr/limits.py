"""What values config keys may have: ranges, choices, and keys of detectron2 that have no effect here."""

import math
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

__all__ = [
    "COMMON_CHOICES",
    "COMMON_RANGES",
    "DEFAULT_MAX_PIXELS",
    "OTHER_DETECTORS_NODES",
    "RUN_CHOICES",
    "SET_DETECTORS",
    "SET_DETECTOR_RANGES",
    "TRAINING_RANGES",
    "UNSUPPORTED",
    "UNSUPPORTED_BY_BASELINES",
    "UNSUPPORTED_BY_SET_DETECTORS",
    "UNSUPPORTED_BY_TRANSFORMERS",
    "Range",
    "value_of",
]


# Of an image; a larger one is taken for a decompression bomb. Pillow's own limit.
DEFAULT_MAX_PIXELS = 2 * 1024**3 // 4 // 3


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low``, which itself is left out if ``above``, to ``high``. Its text completes "it must be"."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        low = f"more than {self.low}" if self.above else f"at least {self.low}"
        return low if self.high == math.inf else f"{low} and at most {self.high}"


def value_of(node: CfgNode, key: str) -> Any:
    """Return the value of a key such as "ALIGNER.REDUCTION"."""
    for name in key.split("."):
        node = node[name]
    return node


# Meta-architectures that read MODEL.SAMDETR.
SET_DETECTORS = ("SAMDETR", "AnchorDETR", "SMCADETR", "SparseRCNN", "TransformersDETR")
_POSITIVE = Range(0, above=True)
_SHARE = Range(0, 1)
_CHANNELS = Range(1, 16384)
# The upper limits of sizes are far beyond what anybody trains; they tell a slip, or a damaged file, from a wish.
SET_DETECTOR_RANGES = {
    f"MODEL.SAMDETR.{key}": limits
    for key, limits in {
        "NUM_CLASSES": Range(1, 100_000),
        "NUM_QUERIES": Range(1, 100_000),
        "HIDDEN_DIM": Range(4, 8192),
        "NUM_HEADS": Range(1, 1024),
        "PROJECTION_NUM_GROUPS": Range(0, 8192),
        "POSITION_TEMPERATURE": _POSITIVE,
        "PRIOR_PROB": Range(1e-6, 1 - 1e-6),
        "DROPOUT": Range(0, 0.99),
        "ENCODER.NUM_LAYERS": Range(0, 100),
        "ENCODER.FEEDFORWARD_DIM": Range(1, 65536),
        "ENCODER.NUM_POINTS": Range(1, 64),
        "ANCHOR_SIZE": Range(0, 1, above=True),
        "DENSE_HEAD.PIXELS_PER_BOX": Range(1, 10_000),
        "QUERY_GENERATOR.NUM_PATTERNS": Range(1, 100),
        "QUERY_GENERATOR.DN_GROUPS": Range(1, 10_000),
        "QUERY_GENERATOR.DN_MAX_QUERIES": Range(1, 100_000),
        "QUERY_GENERATOR.DN_BOX_NOISE": _SHARE,
        "QUERY_GENERATOR.DN_LABEL_NOISE": _SHARE,
        "DECODER.NUM_LAYERS": Range(1, 100),
        "DECODER.FEEDFORWARD_DIM": Range(1, 65536),
        "DECODER.DYNAMIC_DIM": Range(1, 8192),
        "ALIGNER.POOLED_SIZE": Range(1, 64),
        "ALIGNER.REDUCTION": Range(1, 8192),
        "ALIGNER.NUM_KEYPOINTS": Range(0, 1024),
        "ALIGNER.KEYPOINT_HIDDEN_DIMS": Range(1, 65536),
        "CROSS_ATTENTION.NUM_POINTS": Range(1, 64),
        "CROSS_ATTENTION.GAUSSIAN_BETA": _POSITIVE,
        "MATCHER.CLASS_WEIGHT": Range(0),
        "MATCHER.L1_WEIGHT": Range(0),
        "MATCHER.GIOU_WEIGHT": Range(0),
        "LOSS.CLASS_WEIGHT": Range(0),
        "LOSS.L1_WEIGHT": Range(0),
        "LOSS.GIOU_WEIGHT": Range(0),
        "LOSS.FOCAL_ALPHA": _SHARE,
        "LOSS.FOCAL_GAMMA": Range(0, 100),
    }.items()
}
COMMON_RANGES = {
    "MODEL.TRANSFORMERS.NUM_LEVELS": Range(1, 16),
    "MODEL.TRANSFORMERS.DROPOUT": _SHARE,
    "MODEL.PIXEL_MEAN": Range(-1e6, 1e6),
    "MODEL.PIXEL_STD": _POSITIVE,
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "INPUT.MIN_SIZE_TEST": Range(0, 65536),  # 0: as it is
    "INPUT.MAX_SIZE_TEST": Range(1, 65536),
    "INPUT.MAX_PIXELS": Range(1),
    "TEST.DETECTIONS_PER_IMAGE": Range(1, 100_000),
    "TEST.IMS_PER_BATCH": Range(1, 65536),
    "DATALOADER.NUM_WORKERS": Range(0, 1024),
}
TRAINING_RANGES = {
    "SEED": Range(-(2**31), 2**31 - 1),  # negative: drawn
    "INPUT.MIN_SIZE_TRAIN": Range(1, 65536),
    "INPUT.MAX_SIZE_TRAIN": Range(1, 65536),
    "INPUT.DETR_CROP.PROB": _SHARE,
    "INPUT.DETR_CROP.MIN_SIZE": Range(1, 65536),
    "INPUT.DETR_CROP.SIZE": Range(1, 65536),
    "INPUT.PHOTOMETRIC.PROB": _SHARE,
    "INPUT.PHOTOMETRIC.STRENGTH": _SHARE,
    "INPUT.LARGE_SCALE_JITTER.SCALE": Range(0.01, 100),
    "INPUT.MOSAIC.PROB": _SHARE,
    "INPUT.MIXUP.PROB": _SHARE,
    "INPUT.AUGMENTATION_OFF_ITERS": Range(0, 10**9),
    "DATALOADER.MAX_UNREADABLE_IMAGES": Range(0),
    "MODEL.BACKBONE.FREEZE_AT": Range(0, 5),
    "SOLVER.MAX_ITER": Range(1, 10**9),
    "SOLVER.EPOCHS": Range(0, 10**6),
    "SOLVER.IMS_PER_BATCH": Range(1, 65536),
    "SOLVER.BASE_LR": Range(0, 1000, above=True),
    "SOLVER.BASE_LR_END": Range(0, 1000),
    "SOLVER.BACKBONE_MULTIPLIER": Range(0, 1000),
    "SOLVER.BIAS_LR_FACTOR": Range(0, 1000),
    "SOLVER.MOMENTUM": Range(0, 1),
    "SOLVER.WEIGHT_DECAY": _SHARE,
    "SOLVER.WEIGHT_DECAY_NORM": _SHARE,
    "SOLVER.GAMMA": Range(0, 1, above=True),
    "SOLVER.NUM_DECAYS": Range(1, 10**6),
    "SOLVER.WARMUP_ITERS": Range(0, 10**9),
    "SOLVER.WARMUP_FACTOR": _SHARE,
    "SOLVER.CHECKPOINT_PERIOD": Range(1),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": _POSITIVE,
    "SOLVER.REFERENCE_WORLD_SIZE": Range(0, 10**6),
    "SOLVER.PATIENCE": Range(0, 10**6),
    "SOLVER.EMA.DECAY": Range(0, 1 - 1e-9),
    "TEST.EVAL_PERIOD": Range(0),
}
COMMON_CHOICES = {
    "MODEL.SAMDETR.KERNELS": ("torch", "triton"),
    "MODEL.TRANSFORMERS.DETECTOR": ("detr", "conditional_detr", "dab_detr", "deformable_detr"),
    "MODEL.RESNETS.DEPTH": (18, 34, 50, 101, 152),
    "MODEL.RESNETS.NORM": ("", "BN", "FrozenBN", "GN", "LN", "SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N"),
    "MODEL.RESNETS.RES5_DILATION": (1, 2),
    "INPUT.FORMAT": ("RGB", "BGR"),
    "SOLVER.AMP.PRECISION": ("bfloat16", "float16"),
}
RUN_CHOICES = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("none", "horizontal", "vertical"),
    "DATALOADER.UNREADABLE_IMAGES": ("stop", "skip"),
    "SOLVER.OPTIMIZER": ("AdamW", "SGD"),
    "SOLVER.NON_FINITE": ("stop", "skip"),
    "SOLVER.LR_SCHEDULER_NAME": ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"),
    "SOLVER.WARMUP_METHOD": ("linear", "constant"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("norm", "value"),
    "FLOAT32_PRECISION": ("", "highest", "high", "medium"),
}
# Keys of detectron2 that nothing here reads, with the only value that they may have.
UNSUPPORTED = {
    "INPUT.CROP.ENABLED": False,  # INPUT.DETR_CROP takes its place
    "MODEL.MASK_ON": False,
    "MODEL.KEYPOINT_ON": False,
    "MODEL.LOAD_PROPOSALS": False,
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "TEST.AUG.ENABLED": False,
    "TEST.PRECISE_BN.ENABLED": False,
}
UNSUPPORTED_BY_SET_DETECTORS = {"VIS_PERIOD": 0}
# Nodes below MODEL that only detectors of other kinds read.
OTHER_DETECTORS_NODES = (
    "PROPOSAL_GENERATOR",
    "ANCHOR_GENERATOR",
    "RPN",
    "ROI_HEADS",
    "ROI_BOX_HEAD",
    "ROI_BOX_CASCADE_HEAD",
    "ROI_MASK_HEAD",
    "ROI_KEYPOINT_HEAD",
    "SEM_SEG_HEAD",
    "PANOPTIC_FPN",
    "RETINANET",
)
UNSUPPORTED_BY_BASELINES = {
    "MODEL.SAMDETR.KERNELS": "torch",
    "MODEL.SAMDETR.QUERY_GENERATOR.SELECT_FROM_ENCODER": False,
    "MODEL.SAMDETR.DENSE_HEAD.ENABLED": False,
    "MODEL.SAMDETR.DECODER.LOOK_FORWARD_TWICE": False,
    "MODEL.SAMDETR.DECODER.BOX_REFINEMENT": True,
    "MODEL.SAMDETR.RELATIVE_OFFSETS": False,
    "MODEL.SAMDETR.ALIGNER.POOLED_CONTENT": False,
}
UNSUPPORTED_BY_TRANSFORMERS = {"MODEL.SAMDETR.ACTIVATION_CHECKPOINTING": False}
