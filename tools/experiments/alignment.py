#!/usr/bin/env python
"""Measure over a run's checkpoints what alignment does, and plot it: where queries look, and how often matches change.

    tools/experiments/alignment.py --runs output/experiments/runs --names detr_baseline sam_detr \\
        --output tools/experiments/results/alignment.png

For each run it loads the checkpoints of one seed, and finds, on the first images of the config's DATASETS.TEST, which query is
matched with each box in the last decoder layer. Of these queries it measures

* the share of the cross-attention, mean over heads and layers, that lies inside the matched box;
* the distance from keypoints to the matched box (0 inside), as a share of the image's sides, mean over heads and layers
  (without an aligner, the centre of the reference box stands for the keypoints);
* the share of boxes that are matched with another query than at the checkpoint before. A query is known by its number or,
  where reference boxes are selected, by the pixel that its box comes from.

The numbers are written beside the plot, as JSON.
"""

import argparse
import json
import re
from pathlib import Path
from statistics import fmean

import torch
from matplotlib.figure import Figure

import samdetr
from samdetr.cli.common import output_file, run
from samdetr.data import build_test_loader, load_records, register_datasets
from samdetr.errors import UserError
from samdetr.modeling.levels import pixel_points
from samdetr.modeling.meta_arch import SAMDETR
from samdetr.modeling.structures import FeatureLevel, ImageTarget
from samdetr.visualization import record_attention

PANELS = {
    "attention_inside": "share of attention inside the matched box",
    "keypoint_distance": "distance from keypoints to the matched box",
    "changed_matches": "share of boxes with another query than before",
}


def read_targets(name: str, class_names: list[str] | None) -> dict:
    """Return the ground truth of each image of a dataset by its id, for a model with these classes."""
    targets = {}
    for record in load_records(name, class_names):
        found = [entry for entry in record["annotations"] if not entry.get("iscrowd", 0)]
        boxes = torch.tensor([entry["bbox"] for entry in found], dtype=torch.float32).reshape(-1, 4)  # (x, y, w, h)
        boxes[:, :2] += boxes[:, 2:] / 2
        boxes /= torch.tensor([record["width"], record["height"]] * 2)
        targets[record["image_id"]] = ImageTarget(torch.tensor([entry["category_id"] for entry in found]), boxes)
    return targets


def attention_inside(weights: torch.Tensor, level: FeatureLevel, boxes: torch.Tensor) -> float:
    """Return the share of attention inside the boxes: weights (n, M, H, W) and boxes (n, 4) of queries of one image."""
    points = pixel_points([level])[0]  # of a batch of one
    inside = ((points[None] - boxes[:, None, :2]).abs() <= boxes[:, None, 2:] / 2).all(-1)  # (n, N)
    return (weights.flatten(2).mean(1) * inside).sum(1).mean().item()


def distance_outside(points: torch.Tensor, boxes: torch.Tensor) -> float:
    """Return the mean distance from points (n, M, 2) to boxes (n, 4); 0 inside."""
    outside = ((points - boxes[:, None, :2]).abs() - boxes[:, None, 2:] / 2).clamp(min=0)
    return outside.norm(dim=-1).mean().item()


@torch.no_grad()
def measure(model: SAMDETR, inputs: list[dict], targets: dict) -> dict:
    """Return the means over images, and by image the query that is matched with each box."""
    inside, distances, matched = [], [], {}
    for image in inputs:
        target = targets[image["image_id"]]
        if not len(target):
            continue
        images = model.preprocess_images([image])
        with record_attention(model) as layers:
            levels = model.encode(images.tensor, images.image_sizes)
            predictions, _ = model.decode(levels)
        matches = model.criterion.matcher(predictions, [target])
        queries, boxes = matches.query[-1], target.boxes[matches.target[-1]]
        for layer in layers:
            inside.append(attention_inside(layer.attention_weights(queries.tolist())[0], layer.level, boxes))
            distances.append(distance_outside(layer.chosen(queries.tolist()).keypoints[0], boxes))
        selection = model.query_generator.selection
        if selection is not None:
            order = selection.classify(levels)[1][0].amax(-1).argsort(descending=True)
            queries = order[queries]
        matched[image["image_id"]] = dict(zip(matches.target[-1].tolist(), queries.tolist()))
    return {"attention_inside": fmean(inside), "keypoint_distance": fmean(distances), "matched": matched}


def measure_run(folder: Path, num_images: int) -> list[dict]:
    """Measure a run's regular checkpoints, in order of the steps."""
    checkpoints = sorted(folder.glob("model_*.pth"), key=lambda path: path.name)
    checkpoints = [path for path in checkpoints if re.fullmatch(r"model_\d+\.pth", path.name)]
    if len(checkpoints) < 2:
        raise UserError(f"{folder} has {len(checkpoints)} checkpoints: at least two are needed.", argument="runs")
    results, inputs, before = [], [], None
    for path in checkpoints:
        step = int(path.stem.split("_")[1]) + 1
        predictor = samdetr.load(path, device="cpu", options=["DATALOADER.NUM_WORKERS", 0])
        if step % predictor.cfg.SOLVER.CHECKPOINT_PERIOD:
            continue  # saved when the run was stopped
        if not inputs:
            name = predictor.cfg.DATASETS.TEST[0]
            register_datasets(predictor.cfg)
            targets = read_targets(name, predictor.class_names if predictor.knows_classes else None)
            inputs = [image for batch in build_test_loader(predictor.cfg, name) for image in batch][:num_images]
        found = measure(predictor.model, inputs, targets)
        matched = found.pop("matched")
        if before is not None:
            pairs = [(before[i][box], query) for i, boxes in matched.items() for box, query in boxes.items()]
            found["changed_matches"] = fmean(old != new for old, new in pairs)
        results.append({"step": step, **found})
        before = matched
        print(folder, results[-1], flush=True)
    return results


def plot(curves: dict[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(15, 4), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, 3), PANELS.items()):
        for name, points in curves.items():
            points = [point for point in points if key in point]
            axis.plot([point["step"] for point in points], [point[key] for point in points], label=name)
        axis.set(title=label, xlabel="training steps", ylim=(0, None))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with NAME/seedN of each run")
    parser.add_argument("--names", nargs="+", required=True, help="runs to compare")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-images", type=int, default=100)
    parser.add_argument("--output", required=True, help="PNG, SVG or PDF file")
    arguments = parser.parse_args()
    if arguments.num_images < 1:
        raise UserError(f"--num-images is {arguments.num_images}: it must be 1 or more.")
    output = output_file(arguments.output, (".png", ".svg", ".pdf"))
    curves = {
        name: measure_run(arguments.runs / name / f"seed{arguments.seed}", arguments.num_images)
        for name in arguments.names
    }
    output.with_suffix(".json").write_text(json.dumps(curves, indent=1) + "\n")
    plot(curves).savefig(output, dpi=90)
    print(f"{output} and {output.with_suffix('.json')}")


if __name__ == "__main__":
    run(main, runs="--runs")
