#!/usr/bin/env python
"""Read a COCO-format dataset before you spend hours on it, and report what is wrong with it.

    tools/check_dataset.py annotations.json images/
    tools/check_dataset.py annotations.json images/ --no-images      # the JSON only

Exit status 1 if training would fail on it, 0 if it would not (there may be warnings).
"""

import argparse
import json
import math
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import run
from PIL import Image

from samdetr.errors import UserError

# What stops training. Everything else is a warning: the loader drops or clips it, or it only makes results worse.
FATAL = {
    "images missing",
    "images unreadable",
    "images truncated",
    "images of another size than the annotation file says",
    "image ids duplicated",
    "annotation ids duplicated",
    "category ids duplicated",
    "annotations of an unknown category",
    "annotations without a usable box",
    "images without a file_name, width or height",
    "annotations without an id",
    "annotations without an area or iscrowd, which the evaluation needs",
    "categories without a name",
    "datasets without images",
    "datasets without boxes",
}


class Report:
    """Problems by kind, with the first few examples."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)

    def add(self, kind: str, example: object) -> None:
        self.counts[kind] += 1
        if len(self.examples[kind]) < 5:
            self.examples[kind].append(str(example))

    @property
    def fatal(self) -> bool:
        return any(kind in FATAL for kind in self.counts)

    def lines(self) -> list[str]:
        """Return the lines to print, fatal problems first."""
        lines = []
        for kind in sorted(self.counts, key=lambda kind: (kind not in FATAL, kind)):
            level = "ERROR" if kind in FATAL else "warning"
            more = ", ..." if self.counts[kind] > len(self.examples[kind]) else ""
            lines.append(f"{level}: {kind}: {self.counts[kind]} ({', '.join(self.examples[kind])}{more})")
        return lines


def check_annotations(data: dict, report: Report, evaluated_on: bool) -> None:
    """Check the annotation file by itself; evaluation needs more than training."""
    for kind, entries in (("image", "images"), ("annotation", "annotations"), ("category", "categories")):
        for entry_id, times in Counter(entry.get("id") for entry in data[entries]).items():
            if times > 1:
                report.add(f"{kind} ids duplicated", entry_id)
    for entry in ("images", "annotations"):
        if not data[entry]:
            report.add(f"datasets without {'boxes' if entry == 'annotations' else entry}", f'"{entry}" is empty')
    for category in data["categories"]:
        if not category.get("name"):
            report.add("categories without a name", category.get("id"))
    images = {}
    for image in data["images"]:
        if not all(image.get(key) for key in ("file_name", "width", "height")):
            report.add("images without a file_name, width or height", image.get("file_name", image.get("id")))
        else:
            images[image["id"]] = image
    categories = {category["id"] for category in data["categories"]}
    outside_as_corners = normalised = total = 0
    for annotation in data["annotations"]:
        image = images.get(annotation.get("image_id"))
        if image is None:
            report.add("annotations of an unknown image", annotation.get("id"))
            continue
        where = f"{image['file_name']}, annotation {annotation.get('id')}"
        if "id" not in annotation:
            report.add("annotations without an id", where)
        if evaluated_on and not {"area", "iscrowd"} <= annotation.keys():
            report.add("annotations without an area or iscrowd, which the evaluation needs", where)
        if annotation.get("category_id") not in categories:
            report.add("annotations of an unknown category", f"{where}: category {annotation.get('category_id')}")
        box = annotation.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) for x in box):
            report.add("annotations without a usable box", f"{where}: {box}")
            continue
        x, y, w, h = box
        total += 1
        normalised += all(0 <= value <= 1 for value in box)
        if not all(math.isfinite(value) for value in box):
            report.add("boxes that are not finite", where)
        elif w <= 0 or h <= 0:
            report.add("boxes of width or height zero or less", f"{where}: {box}")
        elif x >= image["width"] or y >= image["height"] or x + w <= 0 or y + h <= 0:
            report.add("boxes outside their image", f"{where}: {box}")
        elif x < -1 or y < -1 or x + w > image["width"] + 1 or y + h > image["height"] + 1:
            report.add("boxes that reach over their image", f"{where}: {box}")
            outside_as_corners += w <= image["width"] + 1 and h <= image["height"] + 1 and w > x and h > y
    if total and outside_as_corners > 0.2 * total:
        report.add(
            "boxes look like corners", "a fifth or more fit as [x0, y0, x1, y1]; COCO's format is [x, y, width, height]"
        )
    if total and normalised == total:
        report.add("boxes look normalised", "all values lie in [0, 1]; COCO's format is in pixels")
    with_boxes = {annotation.get("image_id") for annotation in data["annotations"]}
    for image in data["images"]:
        if image.get("id") not in with_boxes:
            report.add("images without boxes", image.get("file_name"))
    used = Counter(annotation.get("category_id") for annotation in data["annotations"])
    for category in data["categories"]:
        if not used[category["id"]]:
            report.add("classes without a box", category.get("name", category["id"]))


def check_image(image: dict, root: Path) -> tuple[str, str] | None:
    """Read one image; return what is wrong, if anything, and an example."""
    path = root / image["file_name"]
    if not path.is_file():
        return "images missing", str(path)
    try:
        with Image.open(path) as opened:
            orientation = opened.getexif().get(274, 1)  # detectron2 turns images upright
            width, height = opened.size if orientation < 5 else opened.size[::-1]
            opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "images truncated" if "truncated" in str(error) else "images unreadable"
        return kind, f"{path}: {error}"
    if (width, height) != (image["width"], image["height"]):
        found = f"{width} x {height} instead of {image['width']} x {image['height']}"
        return "images of another size than the annotation file says", f"{path}: {found}"
    return None


def check_dataset(
    json_file: Path, root: Path, read_images: bool = True, evaluated_on: bool = True
) -> tuple[dict, Report]:
    """Check a dataset.

    Args:
        json_file, root: annotations in COCO's format, and the folder that ``file_name`` is relative to.
        read_images: whether to read the image files.
        evaluated_on: whether the dataset must serve evaluation as well.

    Returns:
        The JSON's content and the report.

    Raises:
        UserError: the file or folder is missing, or the file is not COCO-format JSON.
    """
    if not json_file.is_file():
        raise UserError(f"{json_file}: there is no such file.")
    if read_images and not root.is_dir():
        raise UserError(f"{root}: there is no such folder.")
    try:
        data = json.loads(json_file.read_text())
    except ValueError as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise UserError(f'{json_file} is not in COCO\'s format: it has no list "{key}".')
    report = Report()
    check_annotations(data, report, evaluated_on)
    if read_images:
        readable = [image for image in data["images"] if all(image.get(k) for k in ("file_name", "width", "height"))]
        with ThreadPoolExecutor(8) as pool:
            for problem in pool.map(lambda image: check_image(image, root), readable):
                if problem:
                    report.add(*problem)
    return data, report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json_file", type=Path, help="annotations in COCO's format")
    parser.add_argument("images", type=Path, help="the folder that file_name is relative to")
    parser.add_argument("--no-images", action="store_true", help="do not read the image files")
    parser.add_argument(
        "--train-only", action="store_true", help="it will not be used for evaluation, which needs more"
    )
    arguments = parser.parse_args()
    data, report = check_dataset(
        arguments.json_file, arguments.images, not arguments.no_images, not arguments.train_only
    )
    print(f"{len(data['images'])} images, {len(data['annotations'])} boxes, {len(data['categories'])} classes")
    used = Counter(annotation.get("category_id") for annotation in data["annotations"])
    for category in sorted(data["categories"], key=lambda category: -used[category["id"]]):
        share = used[category["id"]] / max(len(data["annotations"]), 1)
        print(f"  {category.get('name', category['id'])}: {used[category['id']]} ({share:.1%})")
    for line in report.lines():
        print(line)
    print(f"Set MODEL.SAMDETR.NUM_CLASSES {len(data['categories'])}.")
    return 1 if report.fatal else 0


if __name__ == "__main__":
    run(main)
