"""Predictions beside ground truth, drawn with detectron2's Visualizer."""

import numpy as np
from detectron2.data import detection_utils
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

__all__ = ["draw_detections_sheet"]

_SHORTEST_SIDE = 256  # small images are enlarged to this before drawing, so that boxes and labels can be read


def _draw(record: dict, metadata, instances: Instances | None) -> np.ndarray:
    """One image (H, W, 3) with its predictions or, without ``instances``, its ground truth."""
    image = detection_utils.read_image(record["file_name"], format="RGB")
    scale = max(1.0, _SHORTEST_SIDE / min(image.shape[:2]))
    visualizer = Visualizer(image, metadata, scale=scale, instance_mode=ColorMode.IMAGE)
    if instances is None:
        return visualizer.draw_dataset_dict(record).get_image()
    return visualizer.draw_instance_predictions(instances.to("cpu")).get_image()


def draw_detections_sheet(
    records: list[dict], predictions: list[Instances], metadata, score_threshold: float, columns: int = 4
) -> np.ndarray:
    """Draw a sheet of pairs: ground truth at the left, predictions at the right.

    Args:
        records: detectron2's standard dataset dicts, with ``annotations``.
        predictions: the detections in each, in the image's own pixels.
        metadata: of the dataset; names the classes.
        score_threshold: detections below are not drawn, in [0, 1].
        columns: how many pairs stand side by side.

    Returns:
        (H, W, 3) uint8, RGB.
    """
    pairs = []
    for record, instances in zip(records, predictions):
        confident = instances[instances.scores >= score_threshold]
        left, right = _draw(record, metadata, None), _draw(record, metadata, confident)
        pair = np.concatenate([left, np.full((left.shape[0], 2, 3), 255, np.uint8), right], axis=1)
        pairs.append(np.pad(pair, ((4, 4), (4, 4), (0, 0)), constant_values=255))
    rows = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        height = max(pair.shape[0] for pair in row)
        row = [np.pad(p, ((0, height - p.shape[0]), (0, 0), (0, 0)), constant_values=255) for p in row]
        rows.append(np.concatenate(row, axis=1))
    width = max(row.shape[1] for row in rows)
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )
