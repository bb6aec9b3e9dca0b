#!/usr/bin/env python
"""Measure AP and time of exported files beside the checkpoint that they come from.

    tools/measure/exported.py --weights output/demo/model_final.pth --files output/model.onnx output/model.xml

AP is that of DATASETS.TEST. Time is from pixels to detections, for one image at a time, on the CPU, each runtime with its own
number of threads; the files take turns, image by image, and the table shows the median.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn

from samdetr.cli.common import add_model_arguments, load_predictor, run
from samdetr.data import build_test_loader, register_datasets
from samdetr.engine import Trainer
from samdetr.engine.trainer import build_evaluators
from samdetr.errors import UserError
from samdetr.export import Detect, ExportableModel, describe, fit_size, open_exported
from samdetr.predictor import Predictor


class ExportedDetector(nn.Module):
    """An exported file in the place of the model, for evaluation: detectron2's inputs to its Instances."""

    def __init__(self, detect: Detect, description: dict):
        super().__init__()
        self.detect, self.description = detect, description
        self.anchor = nn.Parameter(torch.zeros(()))  # evaluation asks a model's parameters for its device

    def forward(self, batch: list[dict]) -> list[dict]:
        return [{"instances": self.detect_one(inputs)} for inputs in batch]

    def detect_one(self, inputs: dict) -> Instances:
        images = fit_size(inputs["image"][None], self.description).numpy()
        found = {name: torch.from_numpy(values[0]) for name, values in self.detect(images).items()}
        height, width = inputs["height"], inputs["width"]
        boxes = Boxes(found["boxes"] * torch.tensor([width, height, width, height]))
        boxes.clip((height, width))
        instances = Instances((height, width), pred_boxes=boxes, scores=found["scores"], pred_classes=found["classes"])
        return instances[boxes.nonempty()]


def open_checkpoint(predictor: Predictor) -> Detect:
    model = ExportableModel(predictor.model)

    def detect(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = model(torch.from_numpy(images))
        return dict(zip(("boxes", "scores", "classes"), (output.numpy() for output in outputs)))

    return detect


def measure_ap(cfg, detector: ExportedDetector, class_names: list[str] | None) -> tuple[float, float]:
    """Return AP and AP50 on ``cfg.DATASETS.TEST``, whose classes are matched by name if the model's are known."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cfg.OUTPUT_DIR = folder
        results = Trainer.test(cfg, detector, build_evaluators(Trainer, cfg, class_names))
    return results["bbox"]["AP"], results["bbox"]["AP50"]


def measure_seconds(detectors: dict[str, Detect], images: list[np.ndarray]) -> dict[str, float]:
    """Return the median time per image of each; every image goes through all of them in turn."""
    for detect in detectors.values():
        detect(images[0])  # the first call of a runtime prepares it
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    for image in images:
        for name, detect in detectors.items():
            start = time.perf_counter()
            detect(image)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def mebibytes(path: Path) -> float:
    """Return the size of a file, with that of its weights beside it for OpenVINO."""
    return sum(p.stat().st_size for p in {path, path.with_suffix(".bin")} if p.is_file()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser, device=False)
    parser.set_defaults(device="cpu")
    parser.add_argument("--files", nargs="+", type=Path, required=True, help="files of samdetr export")
    parser.add_argument("--images", type=int, default=100, help="how many images are timed")
    arguments = parser.parse_args()
    for path in arguments.files:
        if not path.is_file():
            raise UserError(f"--files {path}: there is no such file.")
    predictor = load_predictor(arguments)
    description, cfg = describe(predictor), predictor.cfg
    register_datasets(cfg)
    class_names = predictor.class_names if predictor.knows_classes else None
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.IMS_PER_BATCH = 1
    detectors = {"checkpoint": open_checkpoint(predictor)}
    detectors |= {path.name: open_exported(path) for path in arguments.files}
    loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
    images = [
        fit_size(batch[0]["image"][None], description).numpy() for batch, _ in zip(loader, range(arguments.images))
    ]
    seconds = measure_seconds(detectors, images)
    sizes = {path.name: f"{mebibytes(path):.1f}" for path in arguments.files}
    rows = []
    for name, detect in detectors.items():
        ap, ap50 = measure_ap(cfg, ExportedDetector(detect, description), class_names)
        rows.append([name, sizes.get(name, "-"), f"{1000 * seconds[name]:.1f}", f"{ap:.2f}", f"{ap50:.2f}"])
    print(
        tabulate(rows, headers=["file", "MiB", "ms per image", "AP", "AP50"], disable_numparse=True, tablefmt="github")
    )


if __name__ == "__main__":
    run(main)
