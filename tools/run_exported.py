#!/usr/bin/env python
"""Run an exported model on an image. Needs numpy, Pillow, and onnxruntime (.onnx), openvino (.xml) or torch (.pt2).

    tools/run_exported.py --model model.onnx --input street.jpg --output detections.png

Copy this file as a start for a service of your own.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps


def open_model(path: Path) -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], dict]:
    """Return a function that maps images (B, 3, H, W) to the named outputs, and the file's description."""
    if path.suffix.lower() == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        names = [output.name for output in session.get_outputs()]
        description = session.get_modelmeta().custom_metadata_map["samdetr"]
        return lambda images: dict(zip(names, session.run(names, {"images": images}))), json.loads(description)
    if path.suffix.lower() == ".xml":
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        description = model.get_rt_info("samdetr").astype(str)
        compiled = core.compile_model(model)
        return lambda images: {
            output.any_name: values for output, values in compiled({"images": images}).items()
        }, json.loads(description)
    import torch

    extra = {"samdetr.json": ""}
    module = torch.export.load(path, extra_files=extra).module()

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = module(torch.from_numpy(images))
        return dict(zip(("boxes", "scores", "classes"), (output.numpy() for output in outputs)))

    return run, json.loads(extra["samdetr.json"])


def prepare(image: Image.Image, description: dict) -> np.ndarray:
    """Resize to the size of evaluation, rounded to what the model takes, and lay out as (1, 3, H, W)."""
    width, height = image.size
    shortest, longest = description["shortest_side"], description["longest_side"]
    scale = min(shortest / min(width, height), longest / max(width, height)) if shortest else 1.0  # 0 means as it is
    divisor = max(1, description["size_divisibility"])
    smallest = -(-description["smallest_side"] // divisor) * divisor
    size = [max(smallest, round(side * scale / divisor) * divisor) for side in (width, height)]
    pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)
    if description["channel_order"] == "BGR":
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="file of tools/export_model.py")
    parser.add_argument("--input", type=Path, required=True, help="image")
    parser.add_argument("--output", type=Path, required=True, help="image with the detections drawn")
    parser.add_argument("--score-threshold", type=float, default=0.3)
    arguments = parser.parse_args()
    if arguments.model.suffix.lower() not in (".onnx", ".xml", ".pt2"):
        sys.exit(f"error: --model {arguments.model}: name a file of tools/export_model.py, .onnx, .xml or .pt2.")
    for option, path in (("--model", arguments.model), ("--input", arguments.input)):
        if not path.is_file():
            sys.exit(f"error: {option} {path}: there is no such file.")
    if arguments.output.suffix.lower() not in Image.registered_extensions():
        sys.exit(f"error: --output {arguments.output}: name an image file, such as detections.png.")
    if not arguments.output.parent.is_dir():
        sys.exit(f"error: --output {arguments.output}: there is no folder {arguments.output.parent}.")
    try:
        image = ImageOps.exif_transpose(Image.open(arguments.input)).convert("RGB")
    except Exception as error:  # Pillow's errors for damaged files have no common base
        sys.exit(f"error: --input {arguments.input} is not an image that can be read ({error}).")
    try:
        model, description = open_model(arguments.model)
    except ImportError as error:
        sys.exit(f"error: {error}: install it, for example pip install onnxruntime.")
    except Exception as error:  # the runtimes' errors have no common base
        sys.exit(f"error: --model {arguments.model} is no file of tools/export_model.py ({type(error).__name__}).")
    found = model(prepare(image, description))
    drawing = ImageDraw.Draw(image)
    for box, score, label in zip(found["boxes"][0], found["scores"][0], found["classes"][0]):
        if score >= arguments.score_threshold:
            corners = (box.clip(0, 1) * np.array(image.size * 2)).tolist()
            text = f"{description['class_names'][label]} {score:.2f}"
            drawing.rectangle(corners, outline="red", width=2)
            drawing.text(corners[:2], text, fill="white", stroke_width=1, stroke_fill="black")
            print(text, [round(x, 1) for x in corners])
    image.save(arguments.output)


if __name__ == "__main__":
    main()
