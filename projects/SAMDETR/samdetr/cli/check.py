"""Read a dataset before you spend hours on it, and report what is wrong with it.

    samdetr check annotations.json images/                  # COCO's format
    samdetr check VOC2007/ --split train                    # Pascal VOC's: the folder above Annotations/
    samdetr check data.yaml --split train                   # YOLO's
    samdetr check annotations.json images/ --no-images      # the annotations only
    samdetr check val.json images/ --eval-only              # it may be without boxes

It reads annotations and images as training and evaluation do. Exit status 1 if these would refuse the dataset, 0 if they
would not: then there may be warnings, of what is left out or only makes results worse, and repairs.
"""

import argparse
import copy
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..data import read_coco, read_voc, read_yolo
from ..data.coco_format import CocoAnnotations
from ..data.findings import Report
from ..data.images import SizeMismatchError, open_picture
from ..errors import UserError

# What COCO's evaluation counts per image, unless TEST.DETECTIONS_PER_IMAGE is larger.
MAX_DETECTIONS = 100


def check_contents(annotations: CocoAnnotations, report: Report, trained_on: bool, evaluated_on: bool) -> None:
    """Look for what nothing can be learned from or measured with."""
    if trained_on and annotations.crowd.all() and not report.errors:
        what = "every box is a crowd region" if len(annotations.crowd) else "there is none"
        report.add("datasets without boxes", what)
    per_image = np.bincount(annotations.image_index[~annotations.crowd], minlength=len(annotations.image_ids))
    per_class = np.bincount(annotations.class_index, minlength=len(annotations.class_names))
    crowded = np.bincount(annotations.image_index, minlength=len(annotations.image_ids)) > per_image
    if evaluated_on and annotations.crowd.all():
        report.add("datasets without boxes to find, for which there will be no AP", annotations.path)
    for kind, indices in (
        ("images without boxes", np.flatnonzero((per_image == 0) & ~crowded)),
        ("images with only crowd regions", np.flatnonzero((per_image == 0) & crowded)),
        (
            f"images with more than {MAX_DETECTIONS} boxes, for which TEST.DETECTIONS_PER_IMAGE has to be raised",
            np.flatnonzero(per_image > MAX_DETECTIONS) if evaluated_on else [],
        ),
    ):
        for index in indices:
            report.add(kind, annotations.file_names[index])
    for index in np.flatnonzero(per_class == 0):
        report.add("classes without a box", annotations.class_names[index])


def check_image(path: str, size: tuple[int, int]) -> list[tuple[str, str]]:
    """Read one image; return the kinds of what is wrong or unusual, each with an example."""
    try:
        picture = open_picture(path, annotated_size=size)
    except SizeMismatchError as error:
        return [("images of another size than the annotation file says", str(error))]
    except UserError as error:
        return [("images unreadable", str(error))]
    return [(f"images: {note}", path) for note in picture.notes]


def check_dataset(
    annotations: CocoAnnotations, read_images: bool = True, trained_on: bool = True, evaluated_on: bool = True
) -> Report:
    """Check a dataset; return the report.

    Args:
        annotations: the dataset as it was read.
        read_images: whether to read the image files.
        trained_on, evaluated_on: what the dataset must serve for.
    """
    report = copy.deepcopy(annotations.report)
    if not read_images:
        report.counts.pop("images missing", None)
    check_contents(annotations, report, trained_on, evaluated_on)
    if read_images:
        paths = [os.path.join(annotations.image_root, name) for name in annotations.file_names]
        images = [(path, tuple(size)) for path, size in zip(paths, annotations.sizes.tolist()) if os.path.lexists(path)]
        with ThreadPoolExecutor(8) as pool:
            for findings in pool.map(lambda image: check_image(*image), images):
                for finding in findings:
                    report.add(*finding)
    return report


def read(arguments: argparse.Namespace) -> CocoAnnotations:
    """Read the annotations, in the format that the arguments tell."""
    path, images = arguments.annotations, arguments.images
    in_coco = not path.is_dir() and path.suffix not in (".yaml", ".yml")
    if in_coco == (images is None) or in_coco == (arguments.split is not None):
        raise UserError(
            "Name a file in COCO's format and its image folder, or a folder in Pascal VOC's format or YOLO's data.yaml with "
            "--split."
        )
    if in_coco:
        if not arguments.no_images and not images.is_dir():
            raise UserError(f"{images}: there is no such folder.")
        return read_coco(path, images)
    return (read_voc if path.is_dir() else read_yolo)(path, arguments.split)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "annotations", type=Path, help="a JSON file (COCO), a folder (Pascal VOC) or a data.yaml (YOLO)"
    )
    parser.add_argument("images", type=Path, nargs="?", help="COCO: the folder that file_name is relative to")
    parser.add_argument("--split", help="Pascal VOC and YOLO: which images, such as train or val")
    parser.add_argument("--no-images", action="store_true", help="do not read the image files")
    purpose = parser.add_mutually_exclusive_group()
    purpose.add_argument("--train-only", action="store_true", help="it will not be evaluated on")
    purpose.add_argument("--eval-only", action="store_true", help="it will not be trained on, which needs boxes")


def main(arguments: argparse.Namespace) -> int:
    annotations = read(arguments)
    report = check_dataset(
        annotations,
        not arguments.no_images,
        trained_on=not arguments.eval_only,
        evaluated_on=not arguments.train_only,
    )
    number = len(annotations.boxes)
    print(
        f"{annotations.path}: {len(annotations.image_ids)} images, {number} boxes, {len(annotations.class_names)} classes"
    )
    used = np.bincount(annotations.class_index, minlength=len(annotations.class_names))
    for index in np.argsort(-used, kind="stable"):
        print(f"  {annotations.class_names[index]}: {used[index]} ({used[index] / max(number, 1):.1%})")
    for line in report.lines():
        print(line)
    print(f"Set MODEL.SAMDETR.NUM_CLASSES {len(annotations.class_names)}.")
    return 1 if report.errors else 0
