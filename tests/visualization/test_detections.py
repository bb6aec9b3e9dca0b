"""samdetr.visualization.detections: only what is confident is drawn."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from samdetr.visualization import (
    draw_detections,
    draw_pairs,
)


def test_only_confident_detections_are_drawn():
    image = np.zeros((64, 64, 3), np.uint8)
    instances = Instances((64, 64))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5, 30, 30], [40, 40, 60, 60]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.2]), torch.tensor([0, 1])
    drawn = draw_detections(image, instances, ["a", "b"], 0.5)
    half = drawn.shape[0] // 2
    assert drawn[:half, :half].any() and not drawn[half + 20 :, half + 20 :].any()
    sheet = draw_pairs([(drawn, drawn)] * 3, columns=2)
    assert sheet.shape == (2 * (drawn.shape[0] + 8), 2 * (2 * drawn.shape[1] + 10), 3)
