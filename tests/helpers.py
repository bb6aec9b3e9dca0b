"""Small configs, models, inputs and problems that tests share. Nothing is downloaded."""

import copy
import functools
import json
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import samdetr
from samdetr.checkpoint import convert_published_state_dict
from samdetr.engine.train_step import TrainStep
from samdetr.modeling.feature_projection import make_padding_mask
from samdetr.modeling.matcher import HungarianMatcher
from samdetr.modeling.position_encoding import pixel_position_encoding
from samdetr.modeling.semantics_aligner import SemanticsAligner
from samdetr.modeling.structures import AlignedQuery, FeatureLevel, ImageTarget, Predictions
from seeded_weights import seeded_tensor

ROOT = Path(__file__).resolve().parent.parent


def load_config(name, *options):
    """A config of this project, by its name, on the CPU, with KEY, VALUE options."""
    return samdetr.load_config(name, ["MODEL.DEVICE", "cpu", *options])


def load_experiment(name, *options):
    """The config ``tools/experiments/configs/NAME.yaml`` on the CPU, with KEY, VALUE options."""
    return load_config(ROOT / "tools" / "experiments" / "configs" / f"{name}.yaml", *options)


TINY = [
    *("MODEL.SAMDETR.HIDDEN_DIM", 32, "MODEL.SAMDETR.NUM_HEADS", 4, "MODEL.SAMDETR.NUM_QUERIES", 12),
    *("MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 8, "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 1),
    *("MODEL.SAMDETR.ENCODER.FEEDFORWARD_DIM", 48, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 3),
    *("MODEL.SAMDETR.DECODER.FEEDFORWARD_DIM", 48, "MODEL.SAMDETR.ALIGNER.KEYPOINT_HIDDEN_DIMS", [16, 16]),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16),
]


SMCA = ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "SMCACrossAttention"]


PLAIN = ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "CrossAttention"]


DN = ["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"]


# Beyond the paper: denoising with negatives, and what needs no denoising.
CONTRASTIVE = [*DN, "MODEL.SAMDETR.QUERY_GENERATOR.DN_NEGATIVES", True]


BEYOND = [
    *("MODEL.SAMDETR.QUERY_GENERATOR.SELECT_FROM_ENCODER", True, "MODEL.SAMDETR.DENSE_HEAD.ENABLED", True),
    *("MODEL.SAMDETR.ANCHOR_SIZE", 0.2, "MODEL.SAMDETR.QUERY_GENERATOR.CONTENT_FROM_ENCODER", True),
    *("MODEL.SAMDETR.DECODER.LOOK_FORWARD_TWICE", True, "MODEL.SAMDETR.LOSS.IOU_AWARE", True),
    *("MODEL.SAMDETR.RELATIVE_OFFSETS", True, "MODEL.SAMDETR.ALIGNER.POOLED_CONTENT", True),
]


MULTI_SCALE = [
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.SAMDETR.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.SAMDETR.ENCODER.NAME", "DeformableTransformerEncoder"),
]


# The smallest model of several levels: one layer for each of them.
TWO_LEVELS = [
    *MULTI_SCALE,
    *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.SAMDETR.IN_FEATURES", ["res4", "res5"]),
    *("MODEL.SAMDETR.DECODER.NUM_LAYERS", 2),
]


def tiny_config(*options):
    """A model of a few thousand parameters for ten classes, single-scale with SMCA unless options say otherwise."""
    return load_config("sam_detr_digits", *TINY, *options)


def tiny_model(*options):
    """The model of :func:`tiny_config`, with weights that make its outputs differ from query to query."""
    model = build_model(tiny_config(*options))
    with torch.no_grad():
        for head in model.decoder.box_heads:
            torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    return model


def make_input(height, width, boxes=(), labels=(), seed=0, **extra):
    """One image in detectron2's input format; boxes are (x0, y0, x1, y1) in pixels."""
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(list(boxes), dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.tensor(list(labels), dtype=torch.long)
    image = 255 * torch.rand(3, height, width, generator=generator)
    return {"image": image, "height": height, "width": width, "instances": instances, **extra}


def make_level(features, valid_size):
    """A level of (B, H, W, C) features with (B, 2) valid heights and widths."""
    size = tuple(features.shape[1:3])
    valid_size = torch.tensor(valid_size, dtype=torch.float32)
    mask = make_padding_mask(size, valid_size)
    position = pixel_position_encoding(size, valid_size, features.shape[-1], 10000.0)
    return FeatureLevel(features, position, valid_size, mask if mask.any() else None)


def make_query(batch=2, queries=3, heads=4, dim=16):
    return AlignedQuery(
        content=torch.randn(batch, queries, heads, dim),
        position=torch.randn(batch, queries, heads, dim),
        keypoints=torch.rand(batch, queries, heads, 2),
        gaussian_scales=torch.randn(batch, queries, heads, 2),
    )


def make_matcher():
    return HungarianMatcher(class_weight=2.0, l1_weight=5.0, giou_weight=2.0, focal_alpha=0.25, focal_gamma=2.0)


def make_problem(counts=(3, 0, 5), layers=2, queries=8, classes=4):
    logits = torch.randn(layers, len(counts), queries, classes)
    boxes = torch.rand(layers, len(counts), queries, 4) * 0.5 + 0.2
    targets = [ImageTarget(torch.randint(classes, (n,)), torch.rand(n, 4) * 0.5 + 0.2) for n in counts]
    return Predictions(logits, boxes), targets


def make_aligner(predict_scales, dim=16, num_heads=4, pooled_size=5, pooled_content=False):
    return SemanticsAligner(
        dim=dim,
        num_heads=num_heads,
        pooled_size=pooled_size,
        reduction=4,
        hidden_dims=[12, 10],
        temperature=10000.0,
        predict_scales=predict_scales,
        pooled_content=pooled_content,
    )


BATCH = [
    make_input(64, 64, [(10, 12, 40, 50), (30, 5, 62, 33)], [3, 7], file_name="a.jpg"),
    make_input(64, 64, [(0, 0, 20, 20)], [1], seed=1, file_name="b.jpg"),
    make_input(64, 64, seed=2, file_name="c.jpg"),
    make_input(64, 64, [(5, 5, 30, 40), (1, 1, 9, 9), (20, 20, 40, 44)], [2, 2, 9], seed=3, file_name="d.jpg"),
]


def make_results(objects, detections, class_names=("a", "b"), images=2):
    """Objects (image, class, box) or (image, class, box, crowd), and detections (image, class, box, score).

    Images and categories are numbered from 1; boxes are (x, y, width, height).
    """
    keys = ("image_id", "category_id", "bbox")
    annotations = [{**dict(zip((*keys, "iscrowd"), entry)), "id": n} for n, entry in enumerate(objects, 1)]
    annotations = [{"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry} for entry in annotations]
    truth = {
        "images": [{"id": number} for number in range(1, images + 1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(class_names, 1)],
        "annotations": annotations,
    }
    return truth, [dict(zip((*keys, "score"), entry)) for entry in detections]


def random_results(seed, images=8, classes=3, objects=40, detections=200):
    """Objects, some of them crowd regions, and detections near them, many with equal scores; see :func:`make_results`."""
    rng = np.random.RandomState(seed)

    def boxes(number):
        return np.concatenate([rng.randint(0, 60, (number, 2)), rng.randint(20, 130, (number, 2))], axis=1)

    where, labels, around = rng.randint(1, images, objects), rng.randint(1, classes + 1, objects), boxes(objects)
    truth = [
        (int(image), int(label), box.tolist(), int(crowd))
        for image, label, box, crowd in zip(where, labels, around, rng.rand(objects) < 0.1)
    ]
    near = rng.randint(0, objects, detections)
    labels = np.where(rng.rand(detections) < 0.6, labels[near], rng.randint(1, classes + 1, detections))
    moved = np.maximum(around[near] + rng.randint(-14, 15, (detections, 4)) * rng.randint(0, 3, (detections, 1)), 1)
    moved[::12, 0] += 300
    scores = rng.randint(1, 20, detections) / 20
    found = [
        (int(image), int(label), box.tolist(), float(score))
        for image, label, box, score in zip(where[near], labels, moved, scores)
    ]
    return make_results(truth, found, class_names=[f"class {n}" for n in range(classes)], images=images)


class Batches:
    """A loader that yields one batch again and again."""

    seed = 7

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield copy.deepcopy(self.batch)


def make_step(model, batch, *options):
    cfg = tiny_config(*options)
    return TrainStep(cfg, model, Batches(batch), torch.optim.SGD(model.parameters(), lr=1e-3))


def frozen_statistics(model):
    """Without BatchNorm's batch statistics, which parts of a batch cannot have in common."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def run_steps(step, iterations=1):
    """Do training steps; return the last metrics."""
    with EventStorage() as storage:
        for step.iter in range(iterations):
            step.run_step()
        return {name: value for name, (value, _) in storage.latest().items()}


REFERENCE = ROOT / "tests" / "reference"


CASES = {
    "r50_12ep": "sam_detr_R_50_1x",
    "r50_50ep": "sam_detr_R_50_50ep",
    "r50_smca_12ep": "sam_detr_smca_R_50_1x",
    "r50_dc5_smca_12ep": "sam_detr_smca_R_50_DC5_1x",
    "r50_ms_12ep": "sam_detr_pp_R_50_1x",
    "r50_ms_smca_12ep": "sam_detr_pp_smca_R_50_1x",
}


def published_shapes(name):
    return {key: tuple(shape) for key, shape in json.loads((REFERENCE / f"{name}.keys.json").read_text()).items()}


@functools.cache  # the published models share most of their parameters
def seeded(name, shape):
    return torch.from_numpy(np.asarray(seeded_tensor(name, shape)))


def published_state_dict(name):
    return {key: seeded(key, shape) for key, shape in published_shapes(name).items()}


def converted_model(name):
    model = build_model(load_config(CASES[name])).eval()
    model.load_state_dict(convert_published_state_dict(published_state_dict(name)))
    return model
