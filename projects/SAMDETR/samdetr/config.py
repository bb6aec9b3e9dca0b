"""Every config key that this project adds to detectron2's."""

from detectron2.config import CfgNode as CN

__all__ = ["add_samdetr_config"]


def add_samdetr_config(cfg: CN) -> None:
    """Add the ``MODEL.SAMDETR`` node and a few solver and input keys, with the published defaults.

    Args:
        cfg: detectron2's config, changed in place.
    """
    node = cfg.MODEL.SAMDETR = CN()

    # Number of object classes. The one number behind class heads, matcher, loss and label embedding.
    node.NUM_CLASSES = 80
    # The backbone's outputs to use, from the finest to the coarsest; several make the multi-scale model.
    node.IN_FEATURES = ["res5"]
    # Model width C and attention heads M, which divides C.
    node.HIDDEN_DIM = 256
    node.NUM_HEADS = 8
    # Number of queries Q.
    node.NUM_QUERIES = 300
    # Groups of the GroupNorm behind the input projections; 0: no norm, as in the published single-scale 50-epoch models.
    node.PROJECTION_NUM_GROUPS = 32
    # Of all sine embeddings, as published.
    node.POSITION_TEMPERATURE = 10000.0
    # Score that every class starts with, as in RetinaNet's section 3.3.
    node.PRIOR_PROB = 0.01

    # Compute each encoder and decoder layer again in the backward pass instead of keeping its activations.
    node.ACTIVATION_CHECKPOINTING = False

    node.ENCODER = CN()
    # A name in ENCODER_REGISTRY: TransformerEncoder, or DeformableTransformerEncoder for several levels.
    node.ENCODER.NAME = "TransformerEncoder"
    node.ENCODER.NUM_LAYERS = 6
    # Hidden width of the feed-forward networks.
    node.ENCODER.FEEDFORWARD_DIM = 2048
    # Deformable attention only: points that each head samples in each level.
    node.ENCODER.NUM_POINTS = 4

    node.QUERY_GENERATOR = CN()
    # A name in QUERY_GENERATOR_REGISTRY: LearnedQueryGenerator, or DenoisingQueryGenerator for DN (DN-DETR).
    node.QUERY_GENERATOR.NAME = "LearnedQueryGenerator"
    # DN only. Groups of denoising queries, each with every box of the image; fewer if there are many boxes.
    node.QUERY_GENERATOR.DN_GROUPS = 5
    # DN only. Most denoising queries of an image, which bounds the memory.
    node.QUERY_GENERATOR.DN_MAX_QUERIES = 500
    # DN only. Centres move by up to this share of half the size, sizes change by up to this share.
    node.QUERY_GENERATOR.DN_BOX_NOISE = 0.4
    # DN only. Probability that a denoising query's label is drawn anew.
    node.QUERY_GENERATOR.DN_LABEL_NOISE = 0.2

    node.DECODER = CN()
    # The layers are spread evenly over the levels, the coarsest first.
    node.DECODER.NUM_LAYERS = 6
    node.DECODER.FEEDFORWARD_DIM = 2048
    # Whether each layer's box is the next layer's reference box, as published. False (baselines without refinement): every
    # layer starts from the query's learned reference box.
    node.DECODER.BOX_REFINEMENT = True

    node.ALIGNER = CN()
    # A name in SEMANTICS_ALIGNER_REGISTRY: SemanticsAligner, or IdentityAligner for baselines without it.
    node.ALIGNER.NAME = "SemanticsAligner"
    # Representative keypoints of a query, each shared by NUM_HEADS / NUM_KEYPOINTS heads; 0: one for each head, as published.
    node.ALIGNER.NUM_KEYPOINTS = 0
    # RoIAlign's bins along each side of a reference box.
    node.ALIGNER.POOLED_SIZE = 7
    # Keypoints are searched in C / REDUCTION channels, by hidden layers of these widths (as published).
    node.ALIGNER.REDUCTION = 4
    node.ALIGNER.KEYPOINT_HIDDEN_DIMS = [256, 512, 512]

    node.CROSS_ATTENTION = CN()
    # A name in CROSS_ATTENTION_REGISTRY: CrossAttention, or SMCACrossAttention for SMCA (paper section 4.5.1). For baselines:
    # MultiHeadCrossAttention (DETR), SMCAMultiHeadCrossAttention (SMCA-DETR), ConditionalCrossAttention (Conditional DETR,
    # DAB-DETR), DeformableCrossAttention (Deformable DETR; all levels in every layer).
    node.CROSS_ATTENTION.NAME = "CrossAttention"
    # SMCA only: divisor of the Gaussian's squared distances, in pixels of the feature map.
    node.CROSS_ATTENTION.GAUSSIAN_BETA = 8.0
    # DeformableCrossAttention only: points that each head samples in each level.
    node.CROSS_ATTENTION.NUM_POINTS = 4

    # Costs of the bipartite matching, as published.
    node.MATCHER = CN()
    node.MATCHER.CLASS_WEIGHT = 2.0
    node.MATCHER.L1_WEIGHT = 5.0
    node.MATCHER.GIOU_WEIGHT = 2.0

    # Weights of the losses, the same for every decoder layer, as published. The focal parameters serve loss and matching.
    node.LOSS = CN()
    node.LOSS.CLASS_WEIGHT = 2.0
    node.LOSS.L1_WEIGHT = 5.0
    node.LOSS.GIOU_WEIGHT = 2.0
    node.LOSS.FOCAL_ALPHA = 0.25
    node.LOSS.FOCAL_GAMMA = 2.0

    # "AdamW" (samdetr.solver), or "SGD", detectron2's own optimizer, for detectron2's own detectors.
    cfg.SOLVER.OPTIMIZER = "AdamW"
    # AdamW only. The backbone's learning rate is this share of SOLVER.BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # AdamW only. Clip the norm of all gradients together (True, as published) or of each parameter's alone (detectron2's way).
    cfg.SOLVER.CLIP_GRADIENTS.FULL_MODEL = True

    # COCO-format datasets of one's own, each [name, annotation file, image folder]; then name them in DATASETS.TRAIN and
    # TEST. Class names come from the annotation file.
    cfg.DATASETS.COCO_FORMAT = []

    # Mixed precision (SOLVER.AMP.ENABLED, detectron2's key) in training and evaluation: "bfloat16", or "float16", which
    # needs CUDA.
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Split each step's IMS_PER_BATCH images into this many parts, one after the other: the same gradients as in one, in
    # less memory (BatchNorm, if not frozen, sees the parts alone).
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Exponential moving average of the weights; it is what is evaluated. DECAY is the old average's share after each step.
    cfg.SOLVER.EMA = CN()
    cfg.SOLVER.EMA.ENABLED = False
    cfg.SOLVER.EMA.DECAY = 0.9998
    # When a loss or gradient is not finite: "stop" training, or "skip" the step (stopping after 100 in a row).
    cfg.SOLVER.NON_FINITE = "stop"

    # Images a batch in evaluation, on each process. With more than one, smaller images are padded, and the backbone's
    # response at the padded border changes results a little (docs/training.md).
    cfg.TEST.IMS_PER_BATCH = 1

    # What happens when a training image cannot be read: "stop", or "skip", which takes another image instead, counts, and
    # stops after MAX_UNREADABLE_IMAGES different ones.
    cfg.DATALOADER.UNREADABLE_IMAGES = "stop"
    cfg.DATALOADER.MAX_UNREADABLE_IMAGES = 100

    # Training augmentation (samdetr.data.dataset_mapper): with probability CROP.PROB, resize the short side to one of
    # CROP.MIN_SIZE and crop CROP.SIZE[0] to CROP.SIZE[1] pixels a side; then resize as without the crop. It replaces
    # detectron2's INPUT.CROP.
    cfg.INPUT.DETR_CROP = CN()
    cfg.INPUT.DETR_CROP.PROB = 0.5
    cfg.INPUT.DETR_CROP.MIN_SIZE = (400, 500, 600)
    cfg.INPUT.DETR_CROP.SIZE = (384, 600)
