"""Export a trained model to ONNX, OpenVINO or torch.export: plain operations, any batch, images of 64 pixels per side or more.

    samdetr export --weights output/demo/model_final.pth --output model.onnx
    samdetr export --weights output/demo/model_final.pth --output model.xml
    samdetr export --weights output/demo/model_final.pth --output model.xml --precision int8 --calibration images/
    samdetr export --weights output/demo/model_final.pth --output model.pt2
    tools/run_exported.py --model model.onnx --input street.jpg --output detections.png

The input of the file is ``images`` (batch, 3, rows, columns), float32 in 0 to 255, already resized, with sides that are
multiples of the ``size_divisibility`` in its metadata (1 for ResNets, mostly 32 for networks of timm); its outputs are
``boxes`` (batch, N, 4) as (x0, y0, x1, y1), normalised, unclipped, ``scores`` and ``classes`` (batch, N), best first. Class
names and input sizes are in its metadata.

ONNX needs: pip install onnx onnxscript onnxruntime. OpenVINO (.xml, with its weights in a .bin) needs: pip install onnx
onnxscript openvino. It keeps weights in half precision with --precision float16; with int8 (pip install nncf), backbone and
encoder compute with 8 bits, whose ranges are measured on images of --calibration, or else of DATASETS.TRAIN.

The file is checked before this tool ends. Its outputs must be those of the model to 1e-4, at three sizes other than the one it
was traced at, with one to three random images. With float16 and int8, scores that lie close together change places; so of the
model's ten best detections per image, the file must find a share with the same class, an IoU of 0.75 or more and a score within
0.1: 95 % with float16, at the same three sizes, and 80 % with int8, on images that were not used for calibration.
"""

import argparse
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_iou

from ..data import load_records, register_datasets
from ..errors import UserError
from ..export import PRECISIONS, Detect, ExportableModel, describe, export, fit_size, open_exported, trace
from ..predictor import Predictor, list_images
from .common import IMAGE_SUFFIXES, add_model_arguments, load_predictor, output_file

NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".xml": ("onnx", "onnxscript", "openvino"), ".pt2": ()}
LARGEST_DIFFERENCE = 1e-4
SMALLEST_SHARE = {"float16": 0.95, "int8": 0.8}
CALIBRATION_IMAGES, CHECK_IMAGES = 120, 30  # a fifth of fewer images is for the check


def outputs_of(predictor: Predictor, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the model's outputs for images (B, 3, H, W), by the names that they have in an exported file."""
    with torch.no_grad():
        boxes, scores, classes = (output.numpy() for output in ExportableModel(predictor.model)(images))
    return {"boxes": boxes, "scores": scores, "classes": classes}


def largest_difference(predictor: Predictor, detect: Detect, size: tuple[int, int], batch: int) -> float:
    """Return the largest difference between an exported file's outputs and the model's, for random images."""
    images = 255 * torch.rand(batch, 3, *size)
    expected, found = outputs_of(predictor, images), detect(images.numpy())
    scores = expected["scores"]
    difference = float(np.abs(found["scores"] - scores).max())
    # Where scores are equal up to rounding, their order is arbitrary: compare those without such a neighbour.
    gaps = np.abs(np.diff(scores, axis=1))
    apart = np.minimum(np.pad(gaps, ((0, 0), (1, 0)), constant_values=1), np.pad(gaps, ((0, 0), (0, 1)))) > 1e-6
    if not apart.any() or (found["classes"] != expected["classes"])[apart].any():
        return float("inf")
    return max(difference, float(np.abs(found["boxes"] - expected["boxes"])[apart].max()))


def share_found(predictor: Predictor, detect: Detect, batches: Iterable[torch.Tensor]) -> float:
    """Return the share of the model's ten best detections per image that a file finds, too, wherever it ranks them.

    Args:
        predictor: the model.
        detect: the exported file, opened.
        batches: images (B, 3, H, W) each.

    Returns:
        In [0, 1]: the share with a detection of the same class, an IoU of 0.75 or more and a score within 0.1.
    """
    shares = []
    for images in batches:
        expected, found = outputs_of(predictor, images), detect(images.numpy())
        for i in range(len(images)):
            best, others = ({k: torch.from_numpy(v[i]) for k, v in outputs.items()} for outputs in (expected, found))
            best = {name: values[:10] for name, values in best.items()}
            alike = box_iou(best["boxes"], others["boxes"]) >= 0.75
            alike &= best["classes"][:, None] == others["classes"]
            alike &= (best["scores"][:, None] - others["scores"]).abs() <= 0.1
            shares.append(alike.any(1).float().mean().item())
    return float(np.mean(shares))


def read_calibration(predictor: Predictor, folder: str | None) -> list[torch.Tensor]:
    """Read images of a folder, or else of the config's training dataset, in an order that is random but always the same.

    Returns:
        Images (1, 3, H, W), resized as an exported file takes them.
    """
    if folder is not None:
        try:
            files = list_images([folder], IMAGE_SUFFIXES)
        except UserError as error:
            raise UserError(str(error), argument="calibration") from error
    else:
        try:
            register_datasets(predictor.cfg)
            files = [record["file_name"] for name in predictor.cfg.DATASETS.TRAIN for record in load_records(name)]
        except (KeyError, UserError) as error:
            raise UserError(
                f"DATASETS.TRAIN cannot be read ({error}): name a folder of images.", argument="calibration"
            ) from error
    if len(files) < 10:
        raise UserError(f"There are {len(files)} images: name a folder of at least 10.", argument="calibration")
    chosen = np.random.RandomState(0).permutation(len(files))[: CALIBRATION_IMAGES + CHECK_IMAGES]
    description = describe(predictor)
    images = (predictor.read(files[i]) for i in chosen)
    return [fit_size(predictor.prepare(image)["image"][None], description) for image in images]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, device=False)
    parser.set_defaults(device="cpu")  # what it is traced on
    parser.add_argument("--output", required=True, help=f"file that ends in {' or '.join(NEEDED)}")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"), help="to trace with"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of an OpenVINO file")
    parser.add_argument("--calibration", metavar="FOLDER", help="images for int8 (default: DATASETS.TRAIN)")


def main(arguments: argparse.Namespace) -> None:
    path, precision = output_file(arguments.output, NEEDED), arguments.precision
    suffix = path.suffix.lower()
    for file in files_of(path):
        if file.exists():
            raise UserError(f"{file} exists already: remove it or name another file.", argument="output")
    if precision != "float32" and suffix != ".xml":
        raise UserError(f"--precision {precision} is for OpenVINO: name a file that ends in .xml.", argument="output")
    if arguments.calibration is not None and precision != "int8":
        raise UserError("--calibration is for --precision int8.")
    require(suffix, *NEEDED[suffix], *(["nncf"] if precision == "int8" else []))
    predictor = load_predictor(arguments)
    images = read_calibration(predictor, arguments.calibration) if precision == "int8" else []
    number = min(CHECK_IMAGES, len(images) // 5)  # of those for the check
    unchecked = path.with_name(f"{path.stem}.unchecked{path.suffix}")
    program = trace(predictor, tuple(arguments.size))
    export(predictor, program, unchecked, precision, [image.numpy() for image in images[number:]])
    torch.manual_seed(0)
    sizes = other_sizes(tuple(arguments.size), predictor.model.backbone.size_divisibility)
    if precision == "float32":
        check_outputs(predictor, unchecked, sizes)
    else:
        random = [255 * torch.rand(batch, 3, *size) for batch, size in enumerate(sizes, 1)]
        check_share(predictor, unchecked, images[:number] or random, SMALLEST_SHARE[precision])
    for file, checked in zip(files_of(unchecked), files_of(path)):
        file.rename(checked)
    print(f"{path}: {sum(file.stat().st_size for file in files_of(path)) / 2**20:.1f} MiB")


def files_of(path: Path) -> list[Path]:
    """Return the files that an exported model consists of."""
    return [path, path.with_suffix(".bin")] if path.suffix.lower() == ".xml" else [path]


def check_outputs(predictor: Predictor, path: Path, sizes: list[tuple[int, int]]) -> None:
    detect = open_exported(path)
    for batch, size in enumerate(sizes, 1):
        difference = largest_difference(predictor, detect, size, batch)
        print(f"{batch} x {size[0]} x {size[1]}: largest difference from the model {difference:.1e}")
        if difference > LARGEST_DIFFERENCE:
            raise UserError(
                f"{path} differs from the model by more than {LARGEST_DIFFERENCE:.0e}; it is kept under that name."
            )


def check_share(predictor: Predictor, path: Path, batches: list[torch.Tensor], smallest: float) -> None:
    share = share_found(predictor, open_exported(path), batches)
    print(f"{100 * share:.1f} % of the model's ten best detections per image are found")
    if share < smallest:
        raise UserError(
            f"{path} finds less than {100 * smallest:.0f} % of the model's best detections; it is kept under that name."
        )


def require(suffix: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"Exporting to {suffix} needs: pip install {' '.join(missing)}")


def other_sizes(size: tuple[int, int], divisibility: int) -> list[tuple[int, int]]:
    """Return three sizes other than the one that is traced: smaller, larger, and of another orientation."""
    divisor = max(32, divisibility)
    height, width = (-(-side // divisor) * divisor for side in size)
    smaller = max(2 * divisor, height // 2 // divisor * divisor)
    return [(smaller, width + divisor), (height + divisor, width + 2 * divisor), (width + 3 * divisor, height)]
