"""Read a picture, the one way for training, evaluation, prediction and the check of a dataset."""

import io
import logging
import os
import stat
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..errors import UserError
from ..limits import DEFAULT_MAX_PIXELS

__all__ = [
    "ImageSource",
    "Picture",
    "SizeMismatchError",
    "check_regular_file",
    "files_below",
    "log_once",
    "open_picture",
    "read_image",
    "read_size",
]

logger = logging.getLogger(__name__)

# A path, the bytes of a file, a PIL image, or an array (H, W, 3) in RGB or (H, W) in grey, of uint8 or uint16.
ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

_LOGGED: set[str] = set()  # the notes that this process has logged
_LIMIT_LOCK = threading.Lock()  # Pillow's limit is a global variable

_ORIENTATION = 0x0112  # EXIF's tag, and how to turn a picture upright by its value
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def files_below(folder: str | os.PathLike) -> list[Path]:
    """Return all files below a folder, also in folders that links lead to; a folder that is reached twice, once.

    Raises:
        UserError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): make it readable, or move it elsewhere.")

    found, seen = [], set()
    for path, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(path)
        place = status.st_dev, status.st_ino
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # which of two ways comes first does not depend on the disk
        found += [Path(path, name) for name in names]
    return sorted(found)


class SizeMismatchError(UserError):
    """A picture is of another size than its annotations are for."""


@dataclass
class Picture:
    """A picture as the model gets it.

    Attributes:
        pixels: (H, W, 3) uint8, RGB.
        notes: what was done to the file's contents beyond the usual, such as "16 bits per pixel are scaled to 8".
    """

    pixels: np.ndarray
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]


def read_image(source: ImageSource, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Read an image as (H, W, 3) uint8, RGB; see :func:`open_picture`. What is unusual about it is logged once."""
    picture = open_picture(source, max_pixels=max_pixels)
    for note in picture.notes:
        log_once(note, _name_of(source))
    return picture.pixels


def log_once(note: str, name: str) -> None:
    """Log a note on a picture, if it is the first one of this process with that note."""
    if note not in _LOGGED:
        _LOGGED.add(note)
        logger.warning("%s: %s (said once, of the first such picture).", name, note)


def open_picture(
    source: ImageSource, *, annotated_size: tuple[int, int] | None = None, max_pixels: float = DEFAULT_MAX_PIXELS
) -> Picture:
    """Read a picture and convert it to 8 bits of RGB.

    It is turned upright by its EXIF data, unless it was annotated as it is stored. Grey of 16 or 32 bits is scaled. Palettes
    and CMYK are converted, transparency is ignored, and of several frames the first is taken.

    Args:
        source: the picture. Files are recognised by their contents.
        annotated_size: width and height according to the annotations, if there are any.
        max_pixels: refuse larger pictures.

    Raises:
        UserError: the file is missing or is no picture, is damaged, too large, or of another size than it was annotated in;
            or the array is not one of those above.
    """
    name = _name_of(source)
    if isinstance(source, np.ndarray):
        picture = _array_to_rgb(source)
    else:
        try:
            image, close = _opened(source, name)
            try:
                width, height = image.size
                if width * height > max_pixels:
                    raise UserError(
                        f"{name} has {width} x {height} pixels, more than INPUT.MAX_PIXELS ({max_pixels}): "
                        "make it smaller, or raise the limit.",
                        argument="max_pixels",
                    )
                picture = _decode(image, annotated_size)
            finally:
                close()
        except UserError:
            raise
        except Exception as error:  # Pillow's errors for damaged files have no common base
            raise UserError(f"{name} is not an image that can be read ({_reason(error)}).") from error
    if annotated_size is not None and picture.size != tuple(annotated_size):
        raise SizeMismatchError(
            f"{name} has {picture.size[0]} x {picture.size[1]} pixels (width x height), but its annotations are for "
            f"{annotated_size[0]} x {annotated_size[1]}: correct the size and the boxes in the annotation file."
        )
    return picture


def read_size(source: str | os.PathLike) -> tuple[int, int]:
    """Return width and height of a picture file, turned upright, from its header.

    Raises:
        UserError: the file is missing or is no picture.
    """
    try:
        image, close = _opened(source, str(source))
        try:
            if image.format == "TIFF":  # which Pillow turns by itself
                image.load()
            return image.size[::-1] if _orientation(image) >= 5 else image.size
        finally:
            close()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{source} is not an image that can be read ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    """Say why a picture cannot be read."""
    if isinstance(error, UnidentifiedImageError):  # whose message names Python's object for the file
        return "not in a format that Pillow knows"
    return f"{type(error).__name__}: {error}"


def check_regular_file(path: str | os.PathLike) -> None:
    """Refuse a path that cannot be read as a file; addresses are left to whoever opens them.

    Raises:
        UserError: there is no such file; or it is a folder, a pipe, a socket, a device, or a link that leads nowhere.
    """
    path = os.fspath(path)
    if "://" in path:
        return
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(path):
            raise UserError(f"{path}: there is no such file (looked in {os.getcwd()}).") from error
        raise UserError(f"{path} cannot be opened ({getattr(error, 'strerror', None) or error}).") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise UserError(f"{path} is a {kinds.get(stat.S_IFMT(mode), 'device')}, not a file.")


def _name_of(source: ImageSource) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return getattr(source, "filename", "") or "An image"


def _opened(source, name: str):
    """Open a source that is not an array; return the PIL image and what closes it."""
    if isinstance(source, Image.Image):
        return source, lambda: None
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        check_regular_file(source)
        file = PathManager.open(os.fspath(source), "rb")
    else:
        raise UserError(f"An image is a path, bytes, a PIL image or an array, not {type(source).__name__}.")
    try:
        image = _read_header(file)
        if image.format == "PNG":  # Pillow decodes pixels without looking at their checksums
            image.verify()
            file.seek(0)
            image = _read_header(file)
    except BaseException:
        file.close()
        raise
    return image, file.close


def _read_header(file) -> Image.Image:
    """Open a file with Pillow, but without its limit on the number of pixels, which is checked here."""
    with _LIMIT_LOCK:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1, which is upright, if it is not known."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF data that cannot be parsed; the pixels are another matter
        return 1
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _decode(image: Image.Image, annotated_size: tuple[int, int] | None) -> Picture:
    if not all(image.size):
        raise UserError(f"An image needs at least one pixel, but this one is {image.size}.")
    image.load()  # before EXIF data are looked for, which would hide damage
    notes = []
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photograph with its preview
        notes.append("several frames, of which the first is used")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        notes.append("transparency is ignored")
    orientation = _orientation(image)
    as_stored = annotated_size is not None and tuple(annotated_size) == image.size != image.size[::-1]
    if orientation >= 5 and as_stored:  # which shows only where width and height change places
        notes.append("annotated as it is stored, not as its EXIF orientation shows it, and used as it is stored")
    elif orientation > 1:
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith("I") or image.mode == "F":
        pixels, note = _to_eight_bits(np.asarray(image))
        return Picture(np.repeat(pixels[..., None], 3, axis=2), [*notes, note])
    return Picture(np.asarray(image.convert("RGB")), notes)


def _array_to_rgb(array: np.ndarray) -> Picture:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype not in (np.uint8, np.uint16) or not shaped:
        raise UserError(
            f"An image given as an array is (H, W, 3) in RGB or (H, W), of uint8 or uint16; this one is {array.shape} of "
            f"{array.dtype}."
        )
    if not array.size:
        raise UserError(f"An image needs at least one pixel, but this array is {array.shape}.")
    notes = []
    if array.dtype == np.uint16:
        array, note = _to_eight_bits(array)
        notes.append(note)
    return Picture(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2), notes)


def _to_eight_bits(array: np.ndarray) -> tuple[np.ndarray, str]:
    """Scale an array to uint8; return it, and what was done."""
    values = np.nan_to_num(array.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high, note = 0, 1, "values from 0 to 1 are scaled to 255"
    elif array.dtype.itemsize > 2 and low >= 0 and high <= 255:
        low, high, note = 0, 255, "32 bits per pixel are rounded to 8"
    elif array.dtype.kind != "f" and low >= 0 and high <= 65535:
        low, high, note = 0, 65535, "16 bits per pixel are scaled to 8"
    else:
        note = "values are scaled from the picture's own lowest and highest to 0 and 255"
    return ((values - low) * (255 / max(high - low, 1e-12))).round().astype(np.uint8), note
