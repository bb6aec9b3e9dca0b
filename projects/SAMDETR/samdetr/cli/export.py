"""Export a trained model to ONNX or torch.export: plain operations, any batch, images of 64 pixels per side or more.

    samdetr export --weights output/demo/model_final.pth --output model.onnx
    samdetr export --weights output/demo/model_final.pth --output model.pt2
    tools/run_exported.py --model model.onnx --input street.jpg --output detections.png

The file is checked before this tool ends: at three sizes other than the one it was traced at, and with one to three images,
its outputs must be those of the model, to 1e-4. Its input is ``images`` (batch, 3, rows, columns), float32 in 0 to 255,
already resized; its outputs are ``boxes`` (batch, N, 4) as (x0, y0, x1, y1), normalised, unclipped, ``scores`` and ``classes``
(batch, N), best first. Class names and input sizes are in its metadata. ONNX needs: pip install onnx onnxscript onnxruntime
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..export import ExportableModel, export, open_exported, trace
from ..predictor import Predictor
from .common import add_model_arguments, load_predictor, output_file


def largest_difference(predictor: Predictor, path: Path, size: tuple[int, int], batch: int) -> float:
    """Return the largest difference between the file's outputs and the model's, for random images."""
    images = 255 * torch.rand(batch, 3, *size)
    with torch.no_grad():
        boxes, scores, classes = (x.numpy() for x in ExportableModel(predictor.model)(images))
    found = open_exported(path)(images.numpy())
    difference = float(np.abs(found["scores"] - scores).max())
    # Where scores are equal up to rounding, their order is arbitrary: compare those without such a neighbour.
    gaps = np.abs(np.diff(scores, axis=1))
    apart = np.minimum(np.pad(gaps, ((0, 0), (1, 0)), constant_values=1), np.pad(gaps, ((0, 0), (0, 1)))) > 1e-6
    if not apart.any() or (found["classes"] != classes)[apart].any():
        return float("inf")
    return max(difference, float(np.abs(found["boxes"] - boxes)[apart].max()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, device=False)
    parser.set_defaults(device="cpu")  # what it is traced on
    parser.add_argument("--output", required=True, help="file that ends in .onnx or .pt2")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"), help="to trace with"
    )


def main(arguments: argparse.Namespace) -> None:
    path = output_file(arguments.output, (".onnx", ".pt2"))
    if path.exists():
        raise UserError(f"{path} exists already: remove it or name another file.", argument="output")
    if path.suffix.lower() == ".onnx":
        require("onnx", "onnxscript", "onnxruntime")
    predictor = load_predictor(arguments)
    unchecked = path.with_name(f"{path.stem}.unchecked{path.suffix}")
    export(predictor, trace(predictor, tuple(arguments.size)), unchecked)
    torch.manual_seed(0)
    for number, size in enumerate(other_sizes(tuple(arguments.size), predictor.model.backbone.size_divisibility), 1):
        difference = largest_difference(predictor, unchecked, size, batch=number)
        print(f"{number} x {size[0]} x {size[1]}: largest difference from the model {difference:.1e}")
        if difference > 1e-4:
            raise UserError(f"{unchecked} differs from the model by more than 1e-4; it is kept under that name.")
    unchecked.rename(path)
    print(f"{path}: {path.stat().st_size / 2**20:.0f} MiB")


def require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"Exporting to ONNX needs: pip install {' '.join(missing)}")


def other_sizes(size: tuple[int, int], divisibility: int) -> list[tuple[int, int]]:
    """Return three sizes other than the one that is traced: smaller, larger, and of another orientation."""
    divisor = max(32, divisibility)
    height, width = (-(-side // divisor) * divisor for side in size)
    smaller = max(2 * divisor, height // 2 // divisor * divisor)
    return [(smaller, width + divisor), (height + divisor, width + 2 * divisor), (width + 3 * divisor, height)]
