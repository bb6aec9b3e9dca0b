"""The embedded dataset ``digits_train`` / ``digits_val``: handwritten digits on photographs, made offline.

Real scans of handwritten digits (8 x 8 pixels, from scikit-learn's bundled copy of the UCI set) are scaled, rotated, coloured
and pasted over crops of scikit-learn's two bundled photographs, sometimes overlapping. Training and validation use different
scans and different regions of the photographs. The images are the same every time. They are written once, as JPEG files and
a COCO-format JSON, below ``$DETECTRON2_DATASETS`` (by default ``./datasets``), and read like COCO. ``digits_val_20`` is the
first 20 images of ``digits_val``, for runs of seconds.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import partial

import numpy as np
from iopath.common.file_io import file_lock
from PIL import Image
from scipy.ndimage import map_coordinates

from ..errors import UserError, import_extra
from .coco_format import CocoAnnotations, read_coco
from .registration import AnnotationSource, register_source

__all__ = ["DIGITS_DATASETS", "DIGIT_CLASSES", "register_digits", "write_digits"]

logger = logging.getLogger(__name__)

DIGIT_CLASSES = [str(digit) for digit in range(10)]
_FOLDER = "samdetr_digits_v1"  # change the number when the images change
_IMAGE_SIZE = 128
_MOST_DIGITS = 5
_DIGIT_SIZES = (24, 64)  # height of a digit in pixels, log-uniform
_MOST_DEGREES = 25
_MOST_OVERLAP = 0.3  # of the smaller box
_WITHOUT_DIGITS = 0.03  # share of the images
_CROP_SIZES = (96, 160)  # side of a photograph's crop, in its pixels


@dataclass(frozen=True)
class _Split:
    num_images: int
    seed: int
    scans: slice  # of the 1797 scans
    columns: slice  # of the photographs, 640 pixels wide


_SPLITS = {
    "train": _Split(num_images=2000, seed=1, scans=slice(0, 1400), columns=slice(0, 440)),
    "val": _Split(num_images=200, seed=2, scans=slice(1400, None), columns=slice(440, None)),
}

# The split of each dataset, and how many of its images.
_DATASETS = {"digits_train": ("train", None), "digits_val": ("val", None), "digits_val_20": ("val", 20)}
DIGITS_DATASETS = list(_DATASETS)


def _draw_scan(scan: np.ndarray, height: float, angle: float) -> np.ndarray:
    """Enlarge a scan, (8, 8) in 0 to 16, to ``height`` pixels, rotate it, and crop it to its extent; return its opacity."""
    side = int(np.ceil(height * 1.5))
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    scale = 8 / height
    cosine, sine = np.cos(angle), np.sin(angle)
    source = [(cosine * y - sine * x) * scale + 4.5, (sine * y + cosine * x) * scale + 4.5]
    ink = map_coordinates(np.pad(scan / 16.0, 1), source, order=3, mode="constant")
    opacity = np.clip((ink - 0.25) / 0.35, 0, 1)
    rows, columns = np.flatnonzero(opacity.max(1) > 0.5), np.flatnonzero(opacity.max(0) > 0.5)
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _background(rng: np.random.RandomState, photographs: list[np.ndarray]) -> np.ndarray:
    """Return a random crop of a photograph as float (size, size, 3), 0 to 255."""
    photograph = photographs[rng.randint(len(photographs))]
    side = rng.randint(_CROP_SIZES[0], _CROP_SIZES[1] + 1)
    top = rng.randint(photograph.shape[0] - side + 1)
    left = rng.randint(photograph.shape[1] - side + 1)
    crop = photograph[top : top + side, left : left + side]
    if rng.rand() < 0.5:
        crop = crop[:, ::-1]
    crop = Image.fromarray(np.ascontiguousarray(crop)).resize((_IMAGE_SIZE, _IMAGE_SIZE), Image.BILINEAR)
    return np.asarray(crop, dtype=np.float64)


def _colour(rng: np.random.RandomState, behind: np.ndarray) -> np.ndarray:
    """Return a colour that differs visibly from the mean colour behind."""
    while True:
        colour = rng.randint(0, 256, 3).astype(np.float64)
        if abs(colour.mean() - behind.mean()) > 60:
            return colour


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the share of the smaller of two (x, y, w, h) boxes that the other covers."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _draw_image(
    rng: np.random.RandomState, photographs: list[np.ndarray], scans: np.ndarray, digits: np.ndarray
) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """Draw one image; return it with its (digit, (x, y, w, h)) in pixels."""
    canvas = _background(rng, photographs)
    objects: list[tuple[int, tuple[int, int, int, int]]] = []
    wanted = 0 if rng.rand() < _WITHOUT_DIGITS else rng.randint(1, _MOST_DIGITS + 1)
    for _ in range(wanted):
        index = rng.randint(len(scans))
        height = np.exp(rng.uniform(*np.log(_DIGIT_SIZES)))
        opacity = _draw_scan(scans[index], height, np.deg2rad(rng.uniform(-_MOST_DEGREES, _MOST_DEGREES)))
        h, w = opacity.shape
        for _ in range(20):
            x, y = rng.randint(_IMAGE_SIZE - w + 1), rng.randint(_IMAGE_SIZE - h + 1)
            if all(_overlap((x, y, w, h), box) <= _MOST_OVERLAP for _, box in objects):
                break
        else:
            continue  # no room left
        behind = canvas[y : y + h, x : x + w]
        share = opacity[..., None] * rng.uniform(0.75, 1.0)
        canvas[y : y + h, x : x + w] = (1 - share) * behind + share * _colour(rng, behind)
        objects.append((int(digits[index]), (int(x), int(y), int(w), int(h))))
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8)), objects


def write_digits(root: str) -> None:
    """Write both splits below ``root``, unless they exist; several processes may do so at the same time.

    Raises:
        UserError: scikit-learn is not installed, or ``root`` cannot be written to.
    """
    target = os.path.join(root, _FOLDER)
    if os.path.isdir(target):
        return
    # The dataset is made of its scans and photographs.
    scikit_learn = import_extra("sklearn.datasets", "scikit-learn")
    try:
        os.makedirs(root, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root} cannot be made ({error}): set DETECTRON2_DATASETS to a folder that can.") from error
    if not os.access(root, os.W_OK):
        raise UserError(f"{root} cannot be written to: set DETECTRON2_DATASETS to a folder that can.")
    with file_lock(target):
        if os.path.isdir(target):  # another process was faster
            return
        logger.info("Writing the embedded dataset to %s (once).", target)
        scans = scikit_learn.load_digits()
        photographs = scikit_learn.load_sample_images().images
        temporary = tempfile.mkdtemp(dir=root, prefix=_FOLDER)
        try:
            os.mkdir(os.path.join(temporary, "annotations"))
            for name, split in _SPLITS.items():
                _write_split(temporary, name, split, scans.images[split.scans], scans.target[split.scans], photographs)
            os.chmod(temporary, 0o755)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _write_split(
    folder: str, name: str, split: _Split, scans: np.ndarray, digits: np.ndarray, photographs: list[np.ndarray]
) -> None:
    rng = np.random.RandomState(split.seed)  # gives the same numbers with every version of numpy
    photographs = [photograph[:, split.columns] for photograph in photographs]
    images, annotations = [], []
    os.mkdir(os.path.join(folder, name))
    for image_id in range(1, split.num_images + 1):
        image, objects = _draw_image(rng, photographs, scans, digits)
        file_name = f"{image_id:06d}.jpg"
        image.save(os.path.join(folder, name, file_name), quality=92)
        images.append({"id": image_id, "file_name": file_name, "height": image.height, "width": image.width})
        for digit, box in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": digit + 1,
                    "bbox": list(box),
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(DIGIT_CLASSES)]
    with open(os.path.join(folder, "annotations", f"{name}.json"), "w") as f:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, f)


def _read_digits(root: str, json_file: str, image_root: str, number: int | None) -> CocoAnnotations:
    write_digits(root)
    annotations = read_coco(json_file, image_root)
    return annotations if number is None else annotations.first(number)


def register_digits(root: str) -> None:
    """Register the datasets of :data:`DIGITS_DATASETS`; the files are written when one is first loaded."""
    for name, (split, number) in _DATASETS.items():
        folder = os.path.join(root, _FOLDER)
        json_file, image_root = os.path.join(folder, "annotations", f"{split}.json"), os.path.join(folder, split)
        register_source(
            AnnotationSource(json_file, image_root, partial(_read_digits, root, json_file, image_root, number)),
            name,
            class_names=DIGIT_CLASSES,
            category_ids=range(1, len(DIGIT_CLASSES) + 1),
        )
