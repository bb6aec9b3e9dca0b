"""What the commands have in common: options for a trained model, outputs, and how they end on a mistake."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..predictor import Predictor, load

# Of these, the image formats that Pillow can read here.
IMAGE_SUFFIXES = Image.registered_extensions().keys() & {
    *(".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
}
VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
SCORE_THRESHOLD = 0.3  # low, because scores of focal loss are lower than a softmax's

# Arguments of the package's functions, and the options that the tools offer for them.
_OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "calibration",
            "class_names",
            "config_file",
            "device",
            "host",
            "input",
            "max_pixels",
            "output",
            "port",
        )
    },
    **{"published": "--published", "size": "--size", "source": "--weights"},
}


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True, device: bool = True) -> None:
    parser.add_argument("--weights", required=required, help="checkpoint; one of this project needs nothing else")
    parser.add_argument("--config-file", help="the config of a checkpoint that carries none")
    parser.add_argument("--class-names", help="names, separated by commas, or a text file with one name per line")
    if device:
        parser.add_argument("--device", help="cpu or cuda; by default CUDA if there is any")


def score(text: str) -> float:
    """Read a score threshold, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError
    return value


def read_class_names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    if os.path.isfile(text):
        try:
            return [line.strip() for line in Path(text).read_text("utf-8-sig").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise UserError(f"{text} is not a text file ({error}).", argument="class_names") from error
    if "," not in text and Path(text).suffix:
        raise UserError(f"{text}: there is no such file.", argument="class_names")
    return [name.strip() for name in text.split(",")]


def load_predictor(arguments: argparse.Namespace, weights: str | None = None, options: Sequence = ()) -> Predictor:
    """Load the model that the common options name; ``weights`` replaces ``--weights``, ``options`` keys of the config."""
    return load(
        weights or arguments.weights,
        config_file=arguments.config_file,
        class_names=read_class_names(arguments.class_names),
        device=arguments.device,
        options=options,
    )


def output_folder(path: str) -> Path:
    """Return ``--output`` as a folder, created if need be; refuse it, before any work is done, if it cannot be written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be created as a folder ({error.strerror}).", argument="output") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{path}: nothing can be written there.", argument="output")
    return folder


def output_file(path: str, suffixes: Iterable[str]) -> Path:
    """Return ``--output`` as a file with one of the suffixes, in a folder that is created if need be; or refuse it."""
    file = Path(path)
    if file.suffix.lower() not in suffixes:
        raise UserError(f"{path}: name a file that ends in {' or '.join(suffixes)}.", argument="output")
    if file.is_dir():
        raise UserError(f"{path} is a folder; name a file.", argument="output")
    output_folder(str(file.parent))
    return file


def drawing_names(files: list[Path], inputs: list[str], suffix_of: Callable[[Path], str]) -> dict[Path, Path]:
    """Return a unique name for the drawing of each file: its path below the named folder, with another suffix."""
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


def run(main: Callable[[], int | None], **options: str) -> None:
    """Call a tool's main function, and end with its status; a user's mistake ends in one line that names the option.

    Args:
        main: the function; it returns the exit status, or None.
        options: names of options that differ from those of the package's arguments.
    """
    try:
        sys.exit(main())
    except UserError as error:
        named = {**_OPTIONS, **options}
        option = f"{named[error.argument]}: " if error.argument in named else ""
        sys.exit(f"error: {option}{error}")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        sys.exit(f"error: {error}{': make room, or write to another folder.' if full else ''}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
