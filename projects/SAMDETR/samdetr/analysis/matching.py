"""Objects and detections as arrays, and which detection finds which object, by COCO's rules.

In this folder: N objects and D detections in I images, of K classes. Boxes are (x, y, width, height) in pixels.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask

from ..errors import UserError

__all__ = ["DetectionResults", "Matches", "match", "overlaps", "read_results"]


@dataclass
class DetectionResults:
    """Ground truth, and what was detected.

    Attributes:
        class_names: K names, in the order of the category ids.
        image_ids: I ids, in ascending order.
        object_image, object_class: (N,) int, each object's index in ``image_ids`` and ``class_names``.
        object_boxes: (N, 4) float.
        crowd: (N,) bool, of regions that count neither as found nor as missed.
        detection_image, detection_class: (D,) int, like those of the objects.
        detection_boxes: (D, 4) float.
        scores: (D,) float, in descending order.
    """

    class_names: list[str]
    image_ids: list[int | str]
    object_image: np.ndarray
    object_class: np.ndarray
    object_boxes: np.ndarray
    crowd: np.ndarray
    detection_image: np.ndarray
    detection_class: np.ndarray
    detection_boxes: np.ndarray
    scores: np.ndarray

    def above(self, score_threshold: float) -> "DetectionResults":
        """Return the same results without detections of a lower score."""
        kept = int((self.scores >= score_threshold).sum())
        names = ("detection_image", "detection_class", "detection_boxes", "scores")
        return dataclasses.replace(self, **{name: getattr(self, name)[:kept] for name in names})

    def object_counts(self) -> np.ndarray:
        """Return the number of objects of each class, (K,) int, without crowd regions."""
        return np.bincount(self.object_class[~self.crowd], minlength=len(self.class_names))


def read_results(ground_truth: dict, detections: Sequence[dict]) -> DetectionResults:
    """Read ground truth and detections in COCO's formats.

    Args:
        ground_truth: "images", "categories" and, unless the images are not annotated, "annotations".
        detections: each with "image_id", "category_id", "bbox" and "score", in any order.

    Raises:
        UserError: a detection is of an image or a category that the ground truth does not have.
    """
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    image_ids = sorted(image["id"] for image in ground_truth["images"])
    index = {
        "image_id": {image_id: number for number, image_id in enumerate(image_ids)},
        "category_id": {category["id"]: number for number, category in enumerate(categories)},
    }

    def column(entries: Sequence[dict], key: str) -> np.ndarray:
        try:
            return np.array([index[key][entry[key]] for entry in entries], np.int64)
        except KeyError as error:
            what = key.removesuffix("_id")
            raise UserError(f"A detection is of the {what} {error}, which is not in the ground truth.") from error

    def boxes(entries: Sequence[dict]) -> np.ndarray:
        return np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)

    objects = ground_truth.get("annotations", [])
    image, scores = column(detections, "image_id"), np.array([entry["score"] for entry in detections], np.float64)
    order = np.lexsort((image, -scores))  # of equal scores, the first image's comes first, as in pycocotools
    return DetectionResults(
        class_names=[category["name"] for category in categories],
        image_ids=image_ids,
        object_image=column(objects, "image_id"),
        object_class=column(objects, "category_id"),
        object_boxes=boxes(objects),
        crowd=np.array([bool(entry.get("iscrowd", 0)) for entry in objects], bool),
        detection_image=image[order],
        detection_class=column(detections, "category_id")[order],
        detection_boxes=boxes(detections)[order],
        scores=scores[order],
    )


def overlaps(results: DetectionResults) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield, for each image with detections: indices of its d detections, of its n objects, and their (d, n) IoU in [0, 1].

    For a crowd region, it is the share of the detection that lies in it.
    """
    grouped = []
    for image in (results.detection_image, results.object_image):
        order = np.argsort(image, kind="stable")
        grouped.append(np.split(order, np.searchsorted(image[order], np.arange(1, len(results.image_ids)))))
    for detections, objects in zip(*grouped):
        if len(detections):
            boxes = results.detection_boxes[detections], results.object_boxes[objects]
            iou = mask.iou(*boxes, results.crowd[objects]) if len(objects) else []
            yield detections, objects, np.reshape(iou, (len(detections), len(objects)))


@dataclass
class Matches:
    """Which detection finds which object.

    Attributes:
        objects: (D,) int, the object that each detection finds; -1 for none.
        ignored: (D,) bool, of detections in crowd regions of their class, which count neither as right nor as wrong.
    """

    objects: np.ndarray
    ignored: np.ndarray

    def found(self, number: int) -> np.ndarray:
        """Return which of ``number`` objects are found, (N,) bool."""
        return np.isin(np.arange(number), self.objects)


def match(results: DetectionResults, iou_threshold: float = 0.5) -> Matches:
    """Match detections with objects of their class as COCO does.

    In the order of their scores, each detection finds the object that it overlaps most of those that are not found yet.
    """
    matches = Matches(np.full(len(results.scores), -1), np.zeros(len(results.scores), bool))
    for detections, objects, iou in overlaps(results):
        crowd = results.crowd[objects]
        same = results.detection_class[detections][:, None] == results.object_class[objects]
        near = same & (iou >= iou_threshold)
        free = ~crowd
        for row in np.flatnonzero(near.any(1)):
            chosen = greatest(iou[row], near[row] & free)
            if chosen >= 0:
                matches.objects[detections[row]] = objects[chosen]
                free[chosen] = False
            else:
                matches.ignored[detections[row]] = (near[row] & crowd).any()
    return matches


def greatest(values: np.ndarray, allowed: np.ndarray) -> int:
    """Return the index of the greatest of the allowed values, the last of equal ones as in pycocotools; -1 for none."""
    if not allowed.any():
        return -1
    return len(values) - 1 - int(np.argmax(np.where(allowed, values, -1)[::-1]))
