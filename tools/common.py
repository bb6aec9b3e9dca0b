"""What the tools that use a trained model have in common: their options, their outputs, and how they end on a mistake."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
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
    if os.path.isfile(text):
        try:
            return [line.strip() for line in Path(text).read_text().splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"--class-names {text} is not a text file ({error}).") from error
    if "," not in text and Path(text).suffix:
        raise UserError(f"--class-names {text}: there is no such file.")
    return [name.strip() for name in text.split(",")]


def load_predictor(arguments: argparse.Namespace, weights: str | None = None) -> Predictor:
    """The model of the common options; ``weights`` in place of ``--weights``."""
    return samdetr.load(
        weights or arguments.weights,
        config_file=arguments.config_file,
        class_names=read_class_names(arguments.class_names),
        device=arguments.device,
    )


def output_folder(path: str) -> Path:
    """``--output`` as a folder, made if need be; refused, before any work is done, if nothing can be written there."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made a folder ({error.strerror}).") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output {path}: nothing can be written there.")
    return folder


def output_file(path: str, suffixes: Iterable[str]) -> Path:
    """``--output`` as a file with one of the suffixes in a folder that is made if need be; refused like a folder."""
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise UserError(f"--output {path}: name a file that ends in {' or '.join(suffixes)}.")
    if file.is_dir():
        raise UserError(f"--output {path} is a folder; name a file.")
    output_folder(str(file.parent))
    return file


def drawing_names(files: list[Path], inputs: list[str], suffix_of: Callable[[Path], str]) -> dict[Path, Path]:
    """For each file the name of its drawing, unique: its path below the folder that was named, with another suffix."""
    folders = [Path(path) for path in inputs if Path(path).is_dir()]
    taken: set[Path] = set()
    names = {}
    for file in files:
        below = next((file.relative_to(folder) for folder in folders if file.is_relative_to(folder)), Path(file.name))
        wanted = below.with_suffix(suffix_of(file))
        name, number = wanted, 1
        while name in taken:
            number += 1
            name = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        taken.add(name)
        names[file] = name
    return names


def run(main: Callable[[], int | None]) -> None:
    """Call a tool's main function; a user's mistake ends it with one line."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
