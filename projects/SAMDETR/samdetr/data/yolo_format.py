"""Read datasets in YOLO's format: a data.yaml, and a text file of boxes per image.

    path: ..                        # the dataset's folder, relative to data.yaml; may be missing
    train: images/train             # a folder, a text file that lists images, or several of these
    val: images/val
    names: [cat, dog]               # or {0: cat, 1: dog}
    kpt_shape: [17, 3]              # only where lines have keypoints after the box; they are left out

The boxes of ``images/train/a.jpg`` are in ``labels/train/a.txt``: the last folder called "images" becomes "labels"; without
one, they are beside the image. A line is a class index and a box, centre and size as shares of the image's sides, or a polygon,
of which the bounding box is taken; with ``kpt_shape``, keypoints follow the box. An image without such a file has no objects.
Everything is turned into COCO's format and read by its reader, so that the same is repaired and refused.
"""

import functools
import os
from pathlib import Path

import yaml

from ..errors import UserError, did_you_mean
from .coco_format import CocoAnnotations, read_coco_content
from .findings import Report
from .images import files_below, read_size

__all__ = ["read_yolo", "yolo_root"]

_SUFFIXES = {".avif", ".bmp", ".jfif", ".jp2", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
_OUTSIDE = 1e-3  # by which a share may exceed [0, 1], for rounding


def read_yolo(file: str | os.PathLike, split: str) -> CocoAnnotations:
    """Read a split. A dataset that has not changed is read once per process.

    Args:
        file: the data.yaml.
        split: "train", "val" or "test".

    Raises:
        UserError: the file is missing, unreadable or of another form, or has no such split. What is wrong with single entries
            is in the ``report``.
    """
    description = _read_yaml(file)
    names = _class_names(file, description)
    images = _images(file, description, split)
    labels = [_label_file(image) for image in images]
    versions = tuple(
        (str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in [*images, *labels] if path.is_file()
    )
    root, keypoints = str(yolo_root(file, description)), _numbers_of_keypoints(file, description)
    return _read_split(str(file), root, tuple(names.items()), keypoints, tuple(images), versions)


def yolo_root(file: str | os.PathLike, description: dict | None = None) -> Path:
    """Return the folder that a data.yaml's paths are relative to."""
    description = _read_yaml(file) if description is None else description
    return _plain(Path(file).parent / str(description.get("path") or "."))


def _plain(path: Path) -> Path:
    """Return a path without "..", which leads to above the folder that a link points to, not to above the link."""
    plain = Path(os.path.normpath(path))
    return plain if not path.exists() or (plain.exists() and plain.samefile(path)) else path.resolve()


def _read_yaml(file: str | os.PathLike) -> dict:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            description = yaml.safe_load(stream)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({error}).") from error
    if not isinstance(description, dict) or "names" not in description:
        raise UserError(f'{file} is not in YOLO\'s format: it needs "names" and, for each split, where its images are.')
    return description


def _class_names(file: str | os.PathLike, description: dict) -> dict[int, str]:
    """Return the names of the classes by their index."""
    names, number = description["names"], description.get("nc")
    names = dict(enumerate(names)) if isinstance(names, list) else names
    usable = isinstance(names, dict) and names and all(type(key) is int and key >= 0 for key in names)
    if not usable or not all(isinstance(name, str | int | float) for name in names.values()):
        raise UserError(
            f'{file}: "names" is {description["names"]!r}: give the classes\' names, as a list or by index.'
        )
    switches = [name for name in names.values() if isinstance(name, bool)]
    if switches:
        raise UserError(f'{file}: YAML reads a name in "names" as {switches[0]}: write the names in quotes.')
    if number is not None and number != len(names):
        raise UserError(f'{file}: "nc" is {number!r}, but there are {len(names)} "names": correct one of them.')
    return {key: str(name) for key, name in names.items()}


def _numbers_of_keypoints(file: str | os.PathLike, description: dict) -> int:
    """Return how many numbers a line has after the box, for keypoints."""
    shape = description.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape):
        raise UserError(f'{file}: "kpt_shape" is {shape!r}: it must be [number of keypoints, 2 or 3].')
    return shape[0] * shape[1]


def _images(file: str | os.PathLike, description: dict, split: str) -> list[Path]:
    """Return the images of a split, in the order of their names."""
    places = description.get(split)
    if not places:
        splits = [key for key in ("train", "val", "test") if description.get(key)]
        raise UserError(f"{file} has no split {split!r}, only {splits}.{did_you_mean(split, splits)}")
    images = []
    for place in places if isinstance(places, list) else [places]:
        path = yolo_root(file, description) / str(place)
        if not path.exists() and str(place).startswith("../"):  # as exports of one well-known service have it
            path = yolo_root(file, description) / str(place)[3:]
        if path.is_dir():
            images += [found for found in files_below(path) if found.suffix.lower() in _SUFFIXES and found.is_file()]
        elif path.is_file():
            try:
                lines = path.read_text("utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{file}: {split!r} is {place!r}, which cannot be read as a list ({error}).") from error
            images += [path.parent / line.strip() for line in lines if line.strip()]
        else:
            raise UserError(f"{file}: {split!r} is {place!r}, but {path} is neither a folder nor a file.")
    return sorted({_plain(image) for image in images})


def _label_file(image: Path) -> Path:
    parts = list(image.parent.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts, f"{image.stem}.txt")


@functools.lru_cache(maxsize=8)
def _read_split(
    file: str, root: str, names: tuple, keypoints: int, images: tuple[Path, ...], _version: tuple
) -> CocoAnnotations:
    report, indices = Report(), {index for index, _ in names}
    entries, annotations = [], []
    for image in images:
        name = os.path.relpath(image, root)
        entry = {"id": name, "file_name": name}
        entries.append(entry)
        if not image.is_file():
            continue  # reported as missing by COCO's reader
        try:
            entry["width"], entry["height"] = read_size(str(image))
        except UserError:
            continue  # reported by COCO's reader
        label = _label_file(image)
        if not label.exists():
            report.add("images without a label file", name)
            continue
        try:
            lines = label.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            report.add("annotation files that are damaged", f"{label}: {error}")
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                box = _read_line(line, f"{label}, line {number}", indices, keypoints, report)
                if box is not None:
                    index, cx, cy, w, h = box
                    size = [entry["width"], entry["height"]] * 2
                    bbox = [value * side for value, side in zip((cx - w / 2, cy - h / 2, w, h), size)]
                    annotation = {"image_id": name, "category_id": index, "bbox": bbox, "iscrowd": 0}
                    annotations.append({**annotation, "id": len(annotations) + 1, "area": bbox[2] * bbox[3]})
    categories = [{"id": index, "name": name} for index, name in names]
    content = {"images": entries, "annotations": annotations, "categories": categories}
    return read_coco_content(content, file, root, report)


def _read_line(
    line: str, where: str, indices: set[int], keypoints: int, report: Report
) -> tuple[int, float, float, float, float] | None:
    """Return the class index and the box, centre and size, of a line; None if it is refused."""
    try:
        label, *values = (float(word) for word in line.split())
    except ValueError:
        report.add("labels that are no box", f"{where}: {line.strip()}")
        return None
    if keypoints and len(values) == 4 + keypoints:
        values = values[:4]
    polygon = not keypoints and len(values) >= 6 and len(values) % 2 == 0
    if len(values) != 4 and not polygon:
        report.add("labels that are no box", f"{where}: {len(values) + 1} numbers")
        return None
    if not all(-_OUTSIDE <= value <= 1 + _OUTSIDE for value in values):
        report.add("labels outside of [0, 1]", f"{where}: {line.strip()}")
        return None
    if label not in indices:
        report.add("labels of an unknown class", f"{where}: class {label:g}")
        return None
    if polygon:
        report.add("polygons", where)
        x, y = values[::2], values[1::2]
        values = [(min(x) + max(x)) / 2, (min(y) + max(y)) / 2, max(x) - min(x), max(y) - min(y)]
    return int(label), *values
