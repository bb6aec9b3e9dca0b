"""Draw detections and ground truth with detectron2's Visualizer."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from detectron2.data import Metadata
from detectron2.structures import Instances
from matplotlib import colormaps

from ..data.images import open_picture
from ..errors import import_extra
from .text import as_drawn

if TYPE_CHECKING:
    from detectron2.utils.visualizer import VisImage, Visualizer

__all__ = ["draw_annotations", "draw_beside_truth", "draw_detections", "draw_pairs"]

# Small images are enlarged before drawing, so that labels can be read, until one side reaches its limit.
_SHORTEST_SIDE, _LONGEST_SIDE = 256, 1024


def _visualizer(image: np.ndarray, class_names: Sequence[str]) -> "Visualizer":
    import_extra("cv2", "opencv-python-headless")  # which detectron2's drawing needs
    from detectron2.utils.visualizer import ColorMode, Visualizer

    metadata = Metadata().set(thing_classes=[as_drawn(name) for name in class_names])
    height, width = image.shape[:2]
    scale = max(1.0, min(_SHORTEST_SIDE / min(height, width), _LONGEST_SIDE / max(height, width)))
    return Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)


def _with_labels_inside(output: "VisImage") -> np.ndarray:
    """Return the picture, with the labels moved inside that detectron2 has placed over its edge."""
    frame, renderer = output.ax.get_window_extent(), output.canvas.get_renderer()
    to_pixels, from_pixels = output.ax.transData, output.ax.transData.inverted()
    for label in output.ax.texts:
        # With its black box, which is 0.7 points larger.
        text = label.get_window_extent(renderer).padded(renderer.points_to_pixels(1))
        # A text that is wider than the picture begins at its left edge.
        right = max(frame.x0 - text.x0, min(0, frame.x1 - text.x1))
        up = min(frame.y1 - text.y1, max(0, frame.y0 - text.y0))
        x, y = to_pixels.transform(label.get_position())
        label.set_position(from_pixels.transform((x + right, y + up)))
    return output.get_image()


def draw_detections(
    image: np.ndarray, instances: Instances, class_names: Sequence[str], score_threshold: float = 0.0
) -> np.ndarray:
    """Draw boxes, classes and scores.

    Args:
        image: (H, W, 3) uint8, RGB.
        instances: on the CPU, with ``pred_boxes`` in the image's pixels, ``scores`` and ``pred_classes``. With
            ``track_ids`` (of an ``ObjectTracker``), labels begin with the object's number, which also chooses the colour.
        class_names: by class index.
        score_threshold: in [0, 1]; detections with a lower score are left out.

    Returns:
        (H', W', 3) uint8, RGB; a small image comes back enlarged.
    """
    confident = instances[instances.scores >= score_threshold]
    visualizer = _visualizer(image, class_names)
    if not confident.has("track_ids"):
        return _with_labels_inside(visualizer.draw_instance_predictions(confident))
    numbers = confident.track_ids.tolist()
    labels = [
        f"{f'#{number} ' if number >= 0 else ''}{visualizer.metadata.thing_classes[i]} {100 * score:.0f}%"
        for number, i, score in zip(numbers, confident.pred_classes.tolist(), confident.scores.tolist())
    ]
    colors = [colormaps["tab20"](number % 20)[:3] if number >= 0 else (0.5, 0.5, 0.5) for number in numbers]
    boxes = confident.pred_boxes
    return _with_labels_inside(visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors))


def draw_annotations(image: np.ndarray, record: dict, class_names: Sequence[str]) -> np.ndarray:
    """Draw the ``annotations`` of a record in detectron2's standard format; see :func:`draw_detections`."""
    # Boxes only: with any masks, detectron2 would want one for every annotation.
    keys = ("bbox", "bbox_mode", "category_id", "iscrowd")
    boxes = [{key: annotation[key] for key in keys if key in annotation} for annotation in record["annotations"]]
    return _with_labels_inside(_visualizer(image, class_names).draw_dataset_dict({"annotations": boxes}))


def draw_beside_truth(
    record: dict, instances: Instances, class_names: Sequence[str], score_threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image with its annotations, and with its detections; return both, of equal size.

    Args:
        record: in detectron2's standard format.
        instances, class_names, score_threshold: see :func:`draw_detections`.
    """
    size = (record["width"], record["height"])
    # Of any size, since detections were made from it.
    image = open_picture(record["file_name"], annotated_size=size, max_pixels=math.inf).pixels
    truth = draw_annotations(image, record, class_names)
    return truth, draw_detections(image, instances, class_names, score_threshold)


def draw_pairs(pairs: Sequence[tuple[np.ndarray, np.ndarray]], columns: int = 4) -> np.ndarray:
    """Arrange pairs of pictures, such as ground truth and detections, on one white sheet.

    Args:
        pairs: (H, W, 3) uint8 each.
        columns: how many pairs stand side by side.
    """
    sheet = []
    for start in range(0, len(pairs), columns):
        row = [_framed(_beside(left, right)) for left, right in pairs[start : start + columns]]
        height = max(pair.shape[0] for pair in row)
        sheet.append(np.concatenate([_padded(pair, height, pair.shape[1]) for pair in row], axis=1))
    width = max(row.shape[1] for row in sheet)
    return np.concatenate([_padded(row, row.shape[0], width) for row in sheet])


def _beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    height = max(len(left), len(right))
    return np.concatenate([_padded(left, height, left.shape[1] + 2), _padded(right, height, right.shape[1])], axis=1)


def _framed(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((4, 4), (4, 4), (0, 0)), constant_values=255)


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.pad(picture, ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0)), constant_values=255)
