"""Fixtures shared by the tests: small configs, small models, small datasets; nothing is downloaded."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

import samdetr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train_net


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


def load_config(name, *options):
    """The config ``configs/NAME.yaml`` on the CPU, with KEY, VALUE options."""
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{name}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
    return cfg


TINY = [
    *("MODEL.SAMDETR.HIDDEN_DIM", 32, "MODEL.SAMDETR.NUM_HEADS", 4, "MODEL.SAMDETR.NUM_QUERIES", 12),
    *("MODEL.SAMDETR.PROJECTION_NUM_GROUPS", 8, "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 1),
    *("MODEL.SAMDETR.ENCODER.FEEDFORWARD_DIM", 48, "MODEL.SAMDETR.DECODER.NUM_LAYERS", 3),
    *("MODEL.SAMDETR.DECODER.FEEDFORWARD_DIM", 48, "MODEL.SAMDETR.ALIGNER.KEYPOINT_HIDDEN_DIMS", [16, 16]),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8),
]
SMCA = ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "SMCACrossAttention"]
PLAIN = ["MODEL.SAMDETR.CROSS_ATTENTION.NAME", "CrossAttention"]
DN = ["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator"]
MULTI_SCALE = [
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.SAMDETR.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.SAMDETR.ENCODER.NAME", "DeformableTransformerEncoder"),
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


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """A COCO-format dataset of six small images with coloured rectangles of two classes; one image has none."""
    from PIL import Image

    root = tmp_path_factory.mktemp("shapes")
    rng = np.random.RandomState(0)
    images, annotations = [], []
    for image_id in range(1, 7):
        width, height = 64 + 8 * image_id, 72
        pixels = rng.randint(0, 80, (height, width, 3)).astype(np.uint8)
        for _ in range(image_id % 3 if image_id != 6 else 0):
            x, y, w, h = rng.randint(0, 30), rng.randint(0, 30), rng.randint(16, 34), rng.randint(16, 34)
            label = rng.randint(2)
            pixels[y : y + h, x : x + w] = (200, 40, 40) if label else (40, 200, 40)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(label) + 1,
                    "bbox": [int(x), int(y), int(w), int(h)],
                    "area": int(w * h),
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width})
    categories = [{"id": 1, "name": "green"}, {"id": 2, "name": "red"}]
    (root / "annotations.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return root


@pytest.fixture(scope="session")
def shapes_dataset(shapes_root):
    """The name under which :func:`shapes_root` is registered."""
    from detectron2.data.datasets import register_coco_instances

    register_coco_instances("shapes", {}, str(shapes_root / "annotations.json"), str(shapes_root))
    return "shapes"


def subprocess_environment():
    """Environment of a process that uses this tree's package and two threads at most."""
    paths = [str(ROOT / "projects" / "SAMDETR"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
