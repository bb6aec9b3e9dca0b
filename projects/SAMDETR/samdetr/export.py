"""Export the model as a graph of plain operations, to ONNX, OpenVINO or ``torch.export``, for any batch and image size."""

import ast
import copy
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UserError, import_extra
from .modeling import SAMDETR
from .modeling.postprocessing import best_pairs
from .predictor import Predictor

__all__ = [
    "PRECISIONS",
    "Detect",
    "ExportableModel",
    "describe",
    "export",
    "fit_size",
    "onnx_to_openvino",
    "open_exported",
    "trace",
]

Detect = Callable[[np.ndarray], dict[str, np.ndarray]]  # from images (B, 3, H, W) to outputs by name
PRECISIONS = ("float32", "float16", "int8")  # of an OpenVINO file
_OUTPUT_NAMES = ("boxes", "scores", "classes")
_SMALLEST_SIDE = 64  # of an image, in pixels
_KEPT_FLOAT = ("model.decoder", "model.query_generator")  # modules that are not quantised


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
    cfg, divisor = predictor.cfg, predictor.model.backbone.size_divisibility
    return {
        "channel_order": cfg.INPUT.FORMAT,
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "smallest_side": divisor * _fewest_multiples(divisor) if divisor else _SMALLEST_SIDE,
        "size_divisibility": divisor,
        "class_names": predictor.class_names,
    }


def trace(predictor: Predictor, size: tuple[int, int] = (480, 640)) -> torch.export.ExportedProgram:
    """Trace the model for any batch and images of at least 64 pixels per side, whose sides are multiples of the backbone's
    ``size_divisibility``, if it has one.

    Args:
        predictor: the model; it is traced on the CPU, in float32.
        size: height and width of the image that it is traced with.

    Raises:
        UserError: the model is no SAMDETR, the size is too small, or torch is too old.
    """
    if not isinstance(predictor.model, SAMDETR):
        raise UserError(f"A {type(predictor.model).__name__} cannot be exported here: only a SAMDETR can.")
    divisor = max(1, predictor.model.backbone.size_divisibility)
    smallest = _fewest_multiples(divisor)
    if min(size) < (side := max(_SMALLEST_SIDE, divisor * smallest)):
        raise UserError(
            f"size is {size[0]} x {size[1]}: trace with an image of at least {side} pixels per side.", argument="size"
        )
    # Some facts about shapes hold for every size, but the tracer cannot prove them; it then asserts them at run time.
    if "prefer_deferred_runtime_asserts_over_guards" not in inspect.signature(torch.export.export).parameters:
        raise UserError(f"Exporting needs a newer torch than {torch.__version__} (2.14 is known to work).")
    height, width = (-(-side // divisor) * divisor for side in size)
    model = ExportableModel(copy.deepcopy(predictor.model).cpu().float()).eval()
    sides = [divisor * torch.export.Dim(name, min=smallest) for name in ("rows", "columns")]
    with torch.no_grad():
        return torch.export.export(
            model,
            (torch.zeros(2, 3, height, width),),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1), 2: sides[0], 3: sides[1]}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _fewest_multiples(divisor: int) -> int:
    """Return how many times ``divisor`` an image's side must be: the tracer treats sizes of 1 in a way of their own."""
    return max(2, _SMALLEST_SIDE // divisor)


def export(
    predictor: Predictor,
    program: torch.export.ExportedProgram,
    path: str | Path,
    precision: str = "float32",
    calibration: Sequence[np.ndarray] = (),
) -> None:
    """Write a traced model to a file that runs without this project.

    Args:
        predictor: the model, for the file's description.
        program: of :func:`trace`.
        path: ending in ``.onnx`` for ONNX, in ``.xml`` for OpenVINO (a ``.bin`` with the weights lies beside it), or in
            ``.pt2`` for ``torch.export``. The file carries :func:`describe` as JSON: ONNX in its metadata and OpenVINO in its
            runtime information as "samdetr", ``torch.export`` in its extra file "samdetr.json".
        precision, calibration: of OpenVINO files, see :func:`onnx_to_openvino`.

    Raises:
        UserError: the ending is none of these, a package that it needs is missing, or the precision is not one that such a file
            can have.
    """
    _check_precision(precision, calibration)
    if precision != "float32" and Path(path).suffix.lower() != ".xml":
        raise UserError(f"{path} cannot be in {precision}: only files of OpenVINO, .xml, can.", argument="precision")
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
    elif path.suffix.lower() == ".xml":
        with tempfile.TemporaryDirectory() as folder:
            export(predictor, program, Path(folder, "model.onnx"))
            onnx_to_openvino(Path(folder, "model.onnx"), path, precision, calibration)
    else:
        raise UserError(
            f"{path}: name a file that ends in .onnx (ONNX), .xml (OpenVINO) or .pt2 (torch.export).", argument="output"
        )


def onnx_to_openvino(
    source: str | Path, path: str | Path, precision: str = "float32", calibration: Sequence[np.ndarray] = ()
) -> None:
    """Convert an ONNX file of :func:`export` to OpenVINO's format.

    Args:
        source: the ONNX file.
        path: ending in ``.xml``; a ``.bin`` of the same name is written beside it.
        precision: one of :data:`PRECISIONS`. With "float16", weights are kept in half precision; with "int8", weights and
            activations of the backbone and the encoder are quantised to 8 bits, and other weights kept in half precision.
        calibration: images (B, 3, H, W) as in :class:`ExportableModel`, on which the activations' ranges are measured for
            "int8".

    Raises:
        UserError: a package is missing, there is no such precision, or no image for the calibration of "int8".
    """
    _check_precision(precision, calibration)
    onnx, openvino = import_extra("onnx", "onnx"), import_extra("openvino", "openvino")
    # OpenVINO's runtime reads ONNX by itself; its converter for other formats would send usage data over the network.
    model = openvino.Core().read_model(str(source))
    graph = onnx.load(str(source), load_external_data=False)
    if precision == "int8":
        with tempfile.TemporaryDirectory() as folder:  # halved before, since floats of a quantised model are not
            half = Path(folder, "half.xml")
            openvino.save_model(model, str(half), compress_to_fp16=True)
            model = openvino.Core().read_model(str(half), config={"ENABLE_MMAP": False})
        model = _quantized(model, calibration, _nodes_below(graph, _KEPT_FLOAT))
    description = next(entry.value for entry in graph.metadata_props if entry.key == "samdetr")
    model.set_rt_info(description, "samdetr")
    openvino.save_model(model, str(path), compress_to_fp16=precision != "float32")


def _check_precision(precision: str, calibration: Sequence[np.ndarray]) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"precision is {precision!r}: choose from {', '.join(PRECISIONS)}.", argument="precision")
    if precision == "int8" and not len(calibration):
        raise UserError("int8 needs images, on which ranges are measured.", argument="calibration")


def _nodes_below(graph, modules: Sequence[str]) -> set[str]:
    """Return the names of an ONNX model's nodes that were traced inside modules, named by their paths in the model."""
    return {
        node.name
        for node in graph.graph.node
        for entry in node.metadata_props
        if entry.key == "pkg.torch.onnx.name_scopes"
        and any(
            scope == module or scope.startswith(f"{module}.")
            for scope in ast.literal_eval(entry.value)
            for module in modules
        )
    }


def _quantized(model, calibration: Sequence[np.ndarray], kept_float: set[str]):
    """Quantise an OpenVINO model to 8 bits after training, but for the operations that come from the named ONNX nodes."""
    os.environ.setdefault("NNCF_CI", "1")  # otherwise it sends usage data over the network
    nncf = import_extra("nncf", "nncf")
    logging.getLogger("nncf").setLevel(logging.WARNING)  # it lists every operation that it leaves as it is
    names = [operation.get_friendly_name() for operation in model.get_ops()]
    return nncf.quantize(
        model,
        nncf.Dataset([{"images": images} for images in calibration]),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER,
        # What an ONNX node becomes may carry a suffix after "/".
        ignored_scope=nncf.IgnoredScope(names=[name for name in names if name.split("/")[0] in kept_float]),
    )


def fit_size(images: Tensor, description: dict) -> Tensor:
    """Resize images to the nearest size that an exported file takes.

    Args:
        images: (B, 3, H, W) in 0 to 255, in the size of evaluation.
        description: from :func:`describe`.

    Returns:
        (B, 3, H', W') float32; H' and W' are multiples of ``size_divisibility`` and at least ``smallest_side``.
    """
    divisor = max(1, description["size_divisibility"])
    smallest = -(-description["smallest_side"] // divisor) * divisor
    size = [max(smallest, round(side / divisor) * divisor) for side in images.shape[2:]]
    images = images.float()
    return images if size == list(images.shape[2:]) else nn.functional.interpolate(images, size, mode="bilinear")


def open_exported(path: str | Path) -> Detect:
    """Open a file of :func:`export` on the CPU.

    Returns:
        A function that maps images (B, 3, H, W) float32, as in :class:`ExportableModel`, to its outputs by name.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: dict(zip(_OUTPUT_NAMES, session.run(list(_OUTPUT_NAMES), {"images": images})))
    if path.suffix.lower() == ".xml":
        import openvino

        # Not what the processor computes fastest, such as bfloat16, which would hide what the file itself loses.
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def infer(images: np.ndarray) -> dict[str, np.ndarray]:
            outputs = compiled({"images": images})
            return {name: outputs[name] for name in _OUTPUT_NAMES}

        return infer
    module = torch.export.load(path).module()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return dict(zip(_OUTPUT_NAMES, (output.numpy() for output in module(torch.from_numpy(images)))))

    return run
