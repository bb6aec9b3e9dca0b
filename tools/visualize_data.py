#!/usr/bin/env python
"""Draw training images as the model sees them: after augmentation, with their boxes and, with DN, the denoising queries.

    tools/visualize_data.py --config-file configs/sam_detr_digits.yaml --output output/data.png
    tools/visualize_data.py --config-file configs/sam_detr_pp_digits.yaml --num-images 6 --output output/data.png
    tools/visualize_data.py --weights output/demo/model_final.pth --output output/data.png

Left: image and boxes. Right, if the config has the DN query generator: the noisy boxes of the first group (dashed,
with their possibly wrong label) over the true ones (thin).
"""

import argparse

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from samdetr.checkpoint import Checkpoint
from samdetr.checks import check_config
from samdetr.cli.common import output_file, run
from samdetr.config import load_config, merge_options
from samdetr.data import build_train_loader, register_datasets
from samdetr.errors import UserError
from samdetr.modeling.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from samdetr.modeling.query_generator import DenoisingQueryGenerator, build_query_generator
from samdetr.modeling.structures import ImageTarget
from samdetr.visualization.text import as_drawn


def read_config(arguments: argparse.Namespace):
    """Return the config that the options name, with its datasets registered."""
    if arguments.config_file:
        cfg = load_config(arguments.config_file)
    elif arguments.weights:
        checkpoint = Checkpoint.read_local(arguments.weights, name="--weights")
        cfg = checkpoint and checkpoint.config()
    else:
        cfg = None
    if cfg is None:
        raise UserError("Name --config-file, or --weights of a checkpoint that carries its config.")
    merge_options(cfg, [*arguments.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", 0])
    register_datasets(cfg)
    check_config(cfg, training=True)
    return cfg


def pixels(inputs: dict, cfg) -> np.ndarray:
    """Return the image (H, W, 3) uint8, RGB."""
    image = inputs["image"].permute(1, 2, 0).numpy()
    return image[..., ::-1] if cfg.INPUT.FORMAT == "BGR" else image


def draw_boxes(axis, corners: torch.Tensor, labels: torch.Tensor | None, names, **style) -> None:
    for i, (x0, y0, x1, y1) in enumerate(corners.tolist()):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, **style))
        if labels is not None:
            name = as_drawn(names[labels[i]])
            axis.text(x0, y0, name, fontsize=7, color="white", backgroundcolor=style["color"], va="bottom")


def draw(batch: list[dict], cfg) -> Figure:
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes
    generator = build_query_generator(cfg)
    denoising = isinstance(generator, DenoisingQueryGenerator)
    columns = 2 if denoising else min(4, len(batch))
    rows = len(batch) if denoising else -(-len(batch) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, inputs in enumerate(batch):
        axis = axes[i, 0] if denoising else axes.flat[i]
        instances = inputs["instances"]
        height, width = instances.image_size
        corners, labels = instances.gt_boxes.tensor, instances.gt_classes
        axis.imshow(pixels(inputs, cfg))
        axis.set_title(f"{width} x {height}, {len(instances)} boxes", fontsize=8)
        draw_boxes(axis, corners, labels, names, color="tab:green", linewidth=1.2)
        if denoising and len(instances):
            scale = torch.tensor([width, height, width, height])
            targets, groups = generator.repeat_targets([ImageTarget(labels, xyxy_to_cxcywh(corners) / scale)])
            noisy_labels, noisy_boxes = generator.add_noise(targets)
            first = len(noisy_labels[0]) // groups // (2 if generator.with_negatives else 1)  # without negatives
            axis = axes[i, 1]
            axis.imshow(pixels(inputs, cfg), alpha=0.6)
            axis.set_title(f"denoising queries, 1 of {groups} groups", fontsize=8)
            draw_boxes(axis, corners, None, names, color="tab:green", linewidth=0.8)
            noisy = cxcywh_to_xyxy(noisy_boxes[0, :first]) * scale
            draw_boxes(axis, noisy, noisy_labels[0, :first], names, color="tab:red", linewidth=1.2, linestyle="--")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", help="whose DATASETS.TRAIN to draw")
    parser.add_argument("--weights", help="a checkpoint of this project: draw what it was trained on")
    parser.add_argument("--num-images", type=int, default=8)
    parser.add_argument("--output", required=True, help="PNG, SVG or PDF file")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE")
    arguments = parser.parse_args()
    if arguments.num_images < 1:
        raise UserError(f"--num-images is {arguments.num_images}: it must be 1 or more.")
    output = output_file(arguments.output, (".png", ".svg", ".pdf"))
    cfg = read_config(arguments)
    torch.manual_seed(max(cfg.SEED, 0))
    batch: list[dict] = []
    for inputs in build_train_loader(cfg):
        batch += inputs
        if len(batch) >= arguments.num_images:
            break
    figure = draw(batch[: arguments.num_images], cfg)
    figure.savefig(output, dpi=90)
    print(f"{output}: {arguments.num_images} images of {', '.join(cfg.DATASETS.TRAIN)}")


if __name__ == "__main__":
    run(main)
