"""Export the model as a graph of plain operations, to ONNX or ``torch.export``, for any batch and image size."""

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError
from .modeling import SAMDETR
from .modeling.postprocessing import best_pairs
from .predictor import Predictor

__all__ = ["ExportableModel", "describe", "export", "open_exported", "trace"]

_OUTPUT_NAMES = ("boxes", "scores", "classes")
_SMALLEST_SIDE = 64  # of an image, in pixels


class ExportableModel(nn.Module):
    """Turn a batch of equally large images into detections.

    Args:
        model: a SAMDETR in evaluation mode.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            images: (B, 3, H, W) float32 in 0 to 255, in the channel order of ``INPUT.FORMAT``, already resized. H and W are
                multiples of the backbone's ``size_divisibility``, if it has one.

        Returns:
            The n best detections of each image: boxes (B, n, 4) as (x0, y0, x1, y1), normalised, not clipped; scores
            (B, n) in (0, 1); classes (B, n) int64.
        """
        model = self.model
        levels = model.encode((images - model.pixel_mean) / model.pixel_std, image_sizes=None)
        predictions, _ = model.decode(levels)
        last = predictions.logits[-1], predictions.boxes[-1]
        scores, classes, corners, _ = best_pairs(*last, model.max_detections)
        return corners, scores, classes


def describe(predictor: Predictor) -> dict:
    """Return what a program that runs the exported file has to know."""
    cfg = predictor.cfg
    return {
        "channel_order": cfg.INPUT.FORMAT,
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "smallest_side": _SMALLEST_SIDE,
        "size_divisibility": predictor.model.backbone.size_divisibility,
        "class_names": predictor.class_names,
    }


def trace(predictor: Predictor, size: tuple[int, int] = (480, 640)) -> torch.export.ExportedProgram:
    """Trace the model for any batch and images of at least 64 pixels per side.

    Args:
        predictor: the model; it is traced on the CPU, in float32.
        size: height and width of the image that it is traced with.

    Raises:
        UserError: the model is no SAMDETR, the size is too small, or torch is too old.
    """
    if not isinstance(predictor.model, SAMDETR):
        raise UserError(f"A {type(predictor.model).__name__} cannot be exported here: only a SAMDETR can.")
    if min(size) < _SMALLEST_SIDE:
        raise UserError(
            f"size is {size[0]} x {size[1]}: trace with an image of at least {_SMALLEST_SIDE} pixels per side.",
            argument="size",
        )
    # Some facts about shapes hold for every size, but the tracer cannot prove them; it then asserts them at run time.
    if "prefer_deferred_runtime_asserts_over_guards" not in inspect.signature(torch.export.export).parameters:
        raise UserError(f"Exporting needs a newer torch than {torch.__version__} (2.14 is known to work).")
    divisor = max(1, predictor.model.backbone.size_divisibility)
    height, width = (-(-side // divisor) * divisor for side in size)
    model = ExportableModel(copy.deepcopy(predictor.model).cpu().float()).eval()
    smallest = max(2, _SMALLEST_SIDE // divisor)
    sides = [divisor * torch.export.Dim(name, min=smallest) for name in ("rows", "columns")]
    with torch.no_grad():
        return torch.export.export(
            model,
            (torch.zeros(2, 3, height, width),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1), 2: sides[0], 3: sides[1]}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def export(predictor: Predictor, program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write a traced model to a file that runs without this project.

    Args:
        predictor: the model, for the file's description.
        program: of :func:`trace`.
        path: ending in ``.onnx`` for ONNX, or in ``.pt2`` for ``torch.export``. The file carries :func:`describe` as JSON:
            ONNX in its metadata as "samdetr", ``torch.export`` in its extra file "samdetr.json".

    Raises:
        UserError: the ending is neither, or a package that ONNX needs is missing.
    """
    path, description = Path(path), json.dumps(describe(predictor))
    if path.suffix.lower() == ".pt2":
        torch.export.save(program, path, extra_files={"samdetr.json": description})
    elif path.suffix.lower() == ".onnx":
        try:
            exported = torch.onnx.export(
                program, input_names=["images"], output_names=list(_OUTPUT_NAMES), opset_version=20, verbose=False
            )
        except ImportError as error:
            raise UserError(f"Exporting to ONNX needs a package: pip install onnx onnxscript ({error}).") from error
        exported.model.metadata_props["samdetr"] = description
        exported.save(path)
    else:
        raise UserError(f"{path}: name a file that ends in .onnx (ONNX) or .pt2 (torch.export).", argument="output")


def open_exported(path: str | Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Open a file of :func:`export`.

    Returns:
        A function that maps images (B, 3, H, W) float32, as in :class:`ExportableModel`, to its outputs by name.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: dict(zip(_OUTPUT_NAMES, session.run(list(_OUTPUT_NAMES), {"images": images})))
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return dict(zip(_OUTPUT_NAMES, (output.numpy() for output in module(torch.from_numpy(images)))))

    return run
