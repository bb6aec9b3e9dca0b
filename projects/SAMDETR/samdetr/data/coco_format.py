"""Read annotation files in COCO's format: the one reader for training, evaluation and the check of a dataset.

What is harmless is repaired and counted; what is not is an error, with the entry and the remedy. Boxes of the reader are what
a model is trained on and evaluated against: those without an area or outside their image are left out, those that reach over
its edge are cut there. Masks and keypoints are not read.
"""

import dataclasses
import functools
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from ..errors import UserError, did_you_mean, one_line
from .findings import Report
from .images import check_regular_file, read_size

__all__ = ["CocoAnnotations", "read_coco", "read_coco_content"]

logger = logging.getLogger(__name__)


@dataclass
class CocoAnnotations:
    """A COCO-format annotation file as it was read. N boxes in I images, of K classes.

    Attributes:
        path: of the file.
        image_root: the folder that ``file_names`` are relative to.
        class_names: in the order of the category ids.
        category_ids: in ascending order.
        image_ids: whole numbers or texts, in ascending order.
        file_names: of each image.
        sizes: (I, 2) int, width and height.
        image_index: (N,) int, each box's image.
        class_index: (N,) int, each box's class.
        boxes: (N, 4) float64, (x, y, width, height) in pixels.
        areas: (N,) float64, in square pixels.
        crowd: (N,) bool, of boxes that are neither learned nor counted.
        annotated: whether the file has annotations at all; COCO's test sets have none.
        report: what was found while reading.
    """

    path: str
    image_root: str
    class_names: list[str] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)
    image_ids: list[int | str] = field(default_factory=list)
    file_names: list[str] = field(default_factory=list)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    image_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    class_index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    annotated: bool = True
    report: Report = field(default_factory=Report)

    def records(self) -> list[dict]:
        """Return the images in detectron2's standard format."""
        annotations: list[list[dict]] = [[] for _ in self.image_ids]
        columns = (self.image_index, self.class_index, self.boxes, self.crowd)
        for image, label, box, crowd in zip(*(column.tolist() for column in columns)):
            annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": int(crowd)}
            annotations[image].append(annotation)
        return [
            {
                "file_name": os.path.join(self.image_root, file_name),
                "height": height,
                "width": width,
                "image_id": image_id,
                "annotations": found,
            }
            for file_name, (width, height), image_id, found in zip(
                self.file_names, self.sizes.tolist(), self.image_ids, annotations
            )
        ]

    def first(self, number: int) -> "CocoAnnotations":
        """Return the annotations of the first images alone."""
        kept = self.image_index < number
        boxes = {name: getattr(self, name)[kept] for name in ("image_index", "class_index", "boxes", "areas", "crowd")}
        images = {name: getattr(self, name)[:number] for name in ("image_ids", "file_names", "sizes")}
        return dataclasses.replace(self, **images, **boxes)

    def ground_truth(self) -> dict[str, list[dict]]:
        """Return the content of a file in COCO's format that pycocotools can evaluate; annotations are numbered from 1."""
        columns = (self.image_index, self.class_index, self.boxes, self.areas, self.crowd)
        annotations = [
            {
                "id": number,
                "image_id": self.image_ids[image],
                "category_id": self.category_ids[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image, label, box, area, crowd) in enumerate(zip(*(c.tolist() for c in columns)), 1)
        ]
        images = [
            {"id": image_id, "file_name": name, "width": width, "height": height}
            for image_id, name, (width, height) in zip(self.image_ids, self.file_names, self.sizes.tolist())
        ]
        categories = [{"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names)]
        return {"images": images, "annotations": annotations, "categories": categories}


@functools.lru_cache(maxsize=8)
def _read_cached(path: str, image_root: str, _version: tuple) -> CocoAnnotations:
    return _Reader(path, image_root).read()


def read_coco(path: str | os.PathLike, image_root: str | os.PathLike) -> CocoAnnotations:
    """Read an annotation file, repair what is harmless, and report everything; see :class:`CocoAnnotations`.

    A file that has not changed is read once per process, unless images that were missing are there now. Images are looked for
    but not opened, except those whose sizes are not in the file.

    Args:
        path: of the file, or its address.
        image_root: the folder that its file names are relative to.

    Raises:
        UserError: the file cannot be read, or is not in COCO's format at all. What is wrong with single entries is in the
            ``report``, see :meth:`Report.refuse_errors`.
    """
    path, local = os.fspath(path), PathManager.get_local_path(os.fspath(path))
    check_regular_file(local)
    status = os.stat(local)
    return call_cached(_read_cached, path, os.fspath(image_root), (status.st_mtime_ns, status.st_size))


def call_cached(reader: Callable, *args) -> CocoAnnotations:
    """Call a reader with a cache; again, if images that it missed the last time are there now."""
    found = reader(*args)
    if any(os.path.exists(path) for path in found.report.examples.get("images missing", ())):
        reader.cache_clear()
        found = reader(*args)
    return found


def read_coco_content(content: dict, path: str, image_root: str, report: Report | None = None) -> CocoAnnotations:
    """Read what another format was turned into; see :func:`read_coco`.

    Args:
        content: "images", "annotations" and "categories", as a file in COCO's format has them.
        path: of the file that the content comes from, for messages.
        image_root: the folder that file names are relative to.
        report: what was found already.
    """
    return _Reader(path, image_root, report).read_content(content)


class _Reader:
    """Reads one file."""

    def __init__(self, path: str, image_root: str, report: Report | None = None):
        self.result = CocoAnnotations(path, image_root, report=report or Report())
        self.report = self.result.report

    def read(self) -> CocoAnnotations:
        return self.read_content(self._parse())

    def read_content(self, content: dict) -> CocoAnnotations:
        images = self._read_images(content["images"])
        categories = self._read_categories(content["categories"])
        self.result.annotated = "annotations" in content
        self._read_annotations(content.get("annotations", []), images, categories)
        self._check_repeated_files()
        return self.result

    def _parse(self) -> dict[str, list]:
        path = self.result.path
        try:
            with PathManager.open(path, "rb") as file:
                content = json.loads(file.read())  # UTF-8, UTF-16 or UTF-32, with or without a byte-order mark
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not a text in UTF-8 (byte {error.object[error.start]:#x} at position {error.start}), so that names "
                "in it cannot be read: save it in UTF-8; it may be in Latin-1 or another local encoding."
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}.") from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
        for key in ("images", "annotations", "categories"):
            missing = not isinstance(content, dict) or (key not in content and key != "annotations")
            if missing or not isinstance(content.get(key, []), list):
                raise UserError(
                    f'{path} is not in COCO\'s format: it has no list "{key}". It needs "images", "annotations" and '
                    '"categories".'
                )
        return content

    def _number(self, value: Any) -> float | None:
        """Return a number, or a text that is one, as a float; else None."""
        if type(value) is str:
            try:
                value = float(value)
            except ValueError:
                return None
            self.report.add("numbers written as text")
            return value
        if type(value) not in (int, float):
            return None
        try:
            return float(value)
        except OverflowError:
            return math.inf

    def _whole_number(self, value: Any) -> int | None:
        """Return a whole number, or a text that is one, as an int; else None."""
        if type(value) is int and abs(value) < 2**63:
            return value
        number = self._number(value)
        return int(number) if number is not None and number.is_integer() and abs(number) < 2**53 else None

    def _read_images(self, entries: list) -> dict[int | str, int]:
        """Read the images; return each one's index by its id."""
        found: dict[int | str, dict] = {}
        if not entries:
            self.report.add("datasets without images", '"images" is empty')
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.report.add("entries that are no objects", f"images, number {number}")
                continue
            image_id = _image_id(entry.get("id"))
            name = entry.get("file_name")
            where = name if isinstance(name, str) and name else f"number {number}"
            if image_id is None:
                self.report.add("images without an id", where)
            elif not isinstance(name, str) or not name:
                self.report.add("images without a file_name", f"number {number}, id {image_id}")
            elif image_id in found:
                same = entry == found[image_id]
                self.report.add("image entries that stand twice" if same else "image ids duplicated", image_id)
            else:
                found[image_id] = entry
        if len({type(image_id) for image_id in found}) > 1:
            self.report.add("image ids of mixed types", count=sum(isinstance(i, int) for i in found))
            texts = {str(image_id): entry for image_id, entry in found.items()}
            if len(texts) < len(found):
                self.report.add("image ids duplicated", "as a number and as text")
            found = texts
        existing = self._find_files(entry["file_name"] for entry in found.values())
        ids = sorted(found)
        self.result.image_ids = ids
        self.result.file_names = [found[image_id]["file_name"] for image_id in ids]
        sizes = [self._size(found[image_id], found[image_id]["file_name"] in existing) for image_id in ids]
        self.result.sizes = np.array(sizes, np.int64).reshape(-1, 2)
        return {image_id: index for index, image_id in enumerate(ids)}

    def _find_files(self, names) -> set[str]:
        """Return those of the file names that exist, and report the others."""
        root = self.result.image_root
        folders: dict[str, set[str]] = {}
        existing = set()
        for name in names:
            if "://" in name:
                self.report.add("images whose file_name is an address", name)
                continue
            if "://" in root:  # not on this machine
                existing.add(name)
                continue
            folder, base = os.path.split(os.path.join(root, name))
            if folder not in folders:
                try:
                    folders[folder] = set(os.listdir(folder or "."))
                except (OSError, ValueError):
                    folders[folder] = set()
            if base in folders[folder]:
                existing.add(name)
            else:
                backslash = "images whose file_name has backslashes"
                self.report.add(backslash if "\\" in name else "images missing", os.path.join(root, name))
        return existing

    def _size(self, entry: dict, exists: bool) -> tuple[int, int]:
        """Return width and height of an image, from its entry or else from the file."""
        sides = tuple(self._whole_number(entry.get(key)) for key in ("width", "height"))
        if all(side is not None and 0 < side < 2**31 for side in sides):
            return sides
        name = entry["file_name"]
        if exists:
            try:
                sides = read_size(os.path.join(self.result.image_root, name))
            except UserError:
                self.report.add("images without a width and height", f"{name}, which is no image that can be read")
            else:
                self.report.add("images without a width and height in the annotation file", name)
                return sides
        return 2**31 - 1, 2**31 - 1  # the image is missing, and refused or skipped; its boxes are not outside of it

    def _read_categories(self, entries: list) -> dict[int, int]:
        """Read the categories; return each one's index by its id."""
        found: dict[int, str] = {}
        if not entries:
            self.report.add("datasets without categories", '"categories" is empty')
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                self.report.add("entries that are no objects", f"categories, number {number}")
                continue
            category_id, name = self._whole_number(entry.get("id")), entry.get("name")
            if isinstance(name, (int, float)) and not isinstance(name, bool):
                self.report.add("category names that are no text", name)
                name = str(name)
            if category_id is None:
                self.report.add("categories without an id", name or f"number {number}")
            elif category_id in found:
                self.report.add("category ids duplicated", category_id)
            elif not isinstance(name, str) or not one_line(name):
                self.report.add("categories without a name", category_id)
            else:
                found[category_id] = one_line(name)
        times = Counter(found.values())
        for category_id, name in found.items():
            if times[name] > 1:
                self.report.add("category names that stand twice", name)
                taken = {*times, *found.values()}
                while name in taken:
                    name += f" ({category_id})"
                found[category_id] = name
        self.result.category_ids = sorted(found)
        self.result.class_names = [found[category_id] for category_id in self.result.category_ids]
        return {category_id: index for index, category_id in enumerate(self.result.category_ids)}

    def _read_annotations(self, entries: list, images: dict[int | str, int], categories: dict[int, int]) -> None:
        report = self.report
        as_text = any(isinstance(image_id, str) for image_id in images)
        rows, ids = [], set()
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                report.add("entries that are no objects", f"annotations, number {number}")
                continue
            where = f"annotation {entry['id']!r}" if "id" in entry else f"annotation number {number}"
            image_id = _image_id(entry.get("image_id"))
            if image_id is None:
                near = did_you_mean("image_id", [key for key in entry if key not in ("image_id", "id")])
                report.add(
                    "annotations without an image_id", where + near.replace(" Did you mean", ", which has").rstrip("?")
                )
                continue
            image = images.get(str(image_id) if as_text else image_id)
            if image is None and isinstance(image_id, str) and not as_text:
                image = images.get(self._whole_number(image_id))
            if image is None:
                report.add("annotations of an unknown image", f"{where}: image {image_id!r}")
                continue
            where = f"{self.result.file_names[image]}, {where}"
            own_id = entry.get("id")
            if type(own_id) is not int or not 0 < own_id < 2**63 or own_id in ids:
                report.add("annotation ids that are missing, duplicated or no positive whole number", where)
            else:
                ids.add(own_id)
            label = categories.get(self._whole_number(entry.get("category_id")))
            if label is None:
                report.add("annotations of an unknown category", f"{where}: category {entry.get('category_id')!r}")
                continue
            box = entry.get("bbox")
            values = [self._number(value) for value in box] if isinstance(box, list) and len(box) == 4 else [None]
            if None in values:
                report.add("annotations without a usable box", f"{where}: {box!r}")
                continue
            rows.append((image, label, *values, *self._area_and_crowd(entry, values, where)))
        table = np.array(rows, np.float64).reshape(-1, 8)
        self._keep_boxes(table)

    def _area_and_crowd(self, entry: dict, box: list[float], where: str) -> tuple[float, bool]:
        area = self._number(entry.get("area"))
        if area is None or not math.isfinite(area) or area <= 0:
            self.report.add("annotations without an area", where)
            area = box[2] * box[3]
        elif area > 1.1 * box[2] * box[3] + 1:
            self.report.add("annotations with a larger area than their box", where)
            area = box[2] * box[3]
        flags = []
        for key in ("iscrowd", "ignore"):
            flag = _flag(entry[key]) if key in entry else False
            if flag is None:
                kind = "annotations whose iscrowd or ignore is neither yes nor no"
                self.report.add(kind, f"{where}: {key} {entry[key]!r}")
            flags.append(bool(flag))
        if "iscrowd" not in entry:
            self.report.add("annotations without iscrowd", where)
        if flags[1] and not flags[0]:
            self.report.add("annotations with ignore", where)
        return area, any(flags)

    def _keep_boxes(self, table: np.ndarray) -> None:
        """Keep the boxes that can be learned, cut at the edges of their images, and report the others."""
        result = self.result
        image, label = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
        boxes, areas, crowd = table[:, 2:6], table[:, 6], table[:, 7] > 0
        sizes = result.sizes[image].astype(np.float64) if len(image) else np.zeros((0, 2))
        names = result.file_names
        finite = np.isfinite(boxes).all(1)
        with np.errstate(invalid="ignore", over="ignore"):
            low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
            positive = (boxes[:, 2:] > 0).all(1) & (high > low).all(1)
            inside_low, inside_high = np.clip(low, 0, sizes), np.clip(high, 0, sizes)
            inside = (inside_high > inside_low).all(1)
            over = np.maximum(np.abs(low - inside_low), np.abs(high - inside_high)).max(1, initial=0) > 1
        kinds = (
            ("boxes that are not finite", ~finite),
            ("boxes of width or height zero or less", finite & ~positive),
            ("boxes outside their image", finite & positive & ~inside),
            ("boxes that reach over their image by more than a pixel", finite & positive & inside & over),
        )
        for kind, which in kinds:
            for index in np.flatnonzero(which)[:5]:
                self.report.add(kind, f"{names[image[index]]}: {boxes[index].tolist()}", count=0)
            if which.any():
                self.report.add(kind, count=int(which.sum()))
        kept = finite & positive & inside
        cut = kept & over
        boxes = np.where(cut[:, None], np.concatenate([inside_low, inside_high - inside_low], 1), boxes)
        areas = np.where(cut, np.minimum(areas, boxes[:, 2] * boxes[:, 3]), areas)
        self._look_at_units(table[:, 2:6], kept, over, sizes)
        _, first = np.unique(table[kept, :6], axis=0, return_index=True)
        for row in np.setdiff1d(np.flatnonzero(kept), np.flatnonzero(kept)[first]):
            self.report.add("boxes that stand twice in their image", f"{names[image[row]]}: {table[row, 2:6].tolist()}")
        result.image_index, result.class_index = image[kept], label[kept]
        result.boxes, result.areas, result.crowd = boxes[kept], areas[kept], crowd[kept]

    def _look_at_units(self, boxes: np.ndarray, kept: np.ndarray, over: np.ndarray, sizes: np.ndarray) -> None:
        """Report boxes that look as if they were in another format."""
        if not len(boxes):
            return
        as_corners = over & (boxes[:, 2:] <= sizes + 1).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        if as_corners.sum() > 0.2 * len(boxes):
            message = "a fifth or more fit as [x0, y0, x1, y1]; COCO's format is [x, y, width, height]"
            self.report.add("boxes look like corners", message)
        if ((boxes >= 0) & (boxes <= 1)).all():
            self.report.add("boxes look normalised", "all values lie in [0, 1]; COCO's format is in pixels")

    def _check_repeated_files(self) -> None:
        """Report files that several images name: harmless if these have the same boxes, else each lacks some."""
        result = self.result
        entries = defaultdict(list)
        for index, name in enumerate(result.file_names):
            entries[os.path.normpath(os.path.join(result.image_root, name))].append(index)
        repeated = {name: indices for name, indices in entries.items() if len(indices) > 1}
        if not repeated:
            return
        contents = defaultdict(list)
        for image, label, box in zip(result.image_index.tolist(), result.class_index.tolist(), result.boxes.tolist()):
            contents[image].append((label, *box))
        for indices in repeated.values():
            same = len({tuple(sorted(contents[index])) for index in indices}) == 1
            self.report.add(
                "images listed twice" if same else "images listed twice with other boxes", result.file_names[indices[0]]
            )


def _image_id(value: Any) -> int | str | None:
    """Return an image's id as an int that numpy can hold, or as text; None if it is neither."""
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int:
        return value if abs(value) < 2**63 else str(value)
    return value if isinstance(value, str) and value else None


def _flag(value: Any) -> bool | None:
    """Return what a value of any form says, yes or no; None if it says neither."""
    if value is None:
        return False
    if isinstance(value, str):
        return {"0": False, "false": False, "no": False, "": False, "1": True, "true": True, "yes": True}.get(
            value.lower()
        )
    return bool(value) if isinstance(value, (bool, int, float)) else None
