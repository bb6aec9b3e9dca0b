"""What the tools that use a trained model have in common: their options, and how they end on a user's mistake."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import samdetr
from samdetr.errors import UserError
from samdetr.predictor import Predictor

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".webm"}
SCORE_THRESHOLD = 0.3  # focal loss gives lower scores than a softmax


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--weights", required=required, help="checkpoint; one of this project needs nothing else")
    parser.add_argument("--config-file", help="the config of a checkpoint that carries none")
    parser.add_argument("--class-names", help="names, separated by commas, or a text file with one a line")
    parser.add_argument("--device", help="cpu or cuda; by default CUDA if there is any")


def read_class_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    if Path(text).is_file():
        return [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]
    if "," not in text and Path(text).suffix:
        raise UserError(f"--class-names {text}: there is no such file.")
    return [name.strip() for name in text.split(",")]


def load_predictor(arguments: argparse.Namespace, weights: str | None = None) -> Predictor:
    """The model of the common options; ``weights`` in place of ``--weights``."""
    names = read_class_names(arguments.class_names)
    return samdetr.load(
        weights or arguments.weights,
        config_file=arguments.config_file,
        class_names=names,
        device=arguments.device,
    )


def run(main: Callable[[], int | None]) -> None:
    """Call a tool's main function; a user's mistake ends it with one line."""
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
