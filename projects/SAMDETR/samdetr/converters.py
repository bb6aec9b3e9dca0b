"""Turn detections into the objects of other tools: supervision's and FiftyOne's. Each is imported when it is first needed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances

from .errors import import_extra

__all__ = ["to_fiftyone", "to_supervision"]


def to_supervision(instances: Instances, class_names: Sequence[str]) -> Any:
    """Turn detections into ``supervision.Detections``.

    Args:
        instances: N detections of one image, as :class:`samdetr.Predictor` returns them.
        class_names: by class index.

    Returns:
        The detections in the same order: ``xyxy`` (N, 4) in pixels, ``confidence`` (N,) in (0, 1), ``class_id`` (N,), and
        ``data["class_name"]`` (N,), from which supervision's annotators take their labels.

    Raises:
        UserError: supervision is not installed.
    """
    supervision = import_extra("supervision", "supervision")
    classes = instances.pred_classes.cpu().numpy()
    return supervision.Detections(
        xyxy=instances.pred_boxes.tensor.cpu().numpy(),
        confidence=instances.scores.cpu().numpy(),
        class_id=classes,
        data={"class_name": np.array([class_names[i] for i in classes], dtype=str)},
    )


def to_fiftyone(instances: Instances, class_names: Sequence[str]) -> Any:
    """Turn detections into the labels of one sample, ``fiftyone.Detections``.

    Args:
        instances, class_names: see :func:`to_supervision`.

    Returns:
        The detections in the same order; each ``fiftyone.Detection`` has ``label``, ``bounding_box`` as [x, y, width, height]
        in [0, 1] of the image's sides, x and y being of the upper left corner, and ``confidence`` in (0, 1).

    Raises:
        UserError: FiftyOne is not installed.
    """
    fiftyone = import_extra("fiftyone", "fiftyone")
    height, width = instances.image_size
    corners = (instances.pred_boxes.tensor.cpu().double().numpy() / (width, height, width, height)).clip(0, 1)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return fiftyone.Detections(
        detections=[
            fiftyone.Detection(label=class_names[i], bounding_box=box, confidence=score)
            for i, box, score in zip(instances.pred_classes.tolist(), boxes.tolist(), instances.scores.tolist())
        ]
    )
