"""samdetr.visualization.detections: only what is confident is drawn, and labels can be read."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.visualizer import VisImage

from samdetr.visualization import draw_detections, draw_pairs


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


def test_labels_stay_inside_the_picture(monkeypatch):
    outputs = []
    monkeypatch.setattr(VisImage, "get_image", lambda self: outputs.append(self))
    corners = [[100.0, 2, 127, 60], [2, 100, 30, 127], [60, 110, 127, 127], [0, 0, 12, 12], [120, 120, 128, 128]]
    instances = Instances((128, 128), pred_boxes=Boxes(torch.tensor(corners)), scores=torch.ones(5))
    instances.pred_classes = torch.zeros(5, dtype=torch.long)
    draw_detections(np.zeros((128, 128, 3), np.uint8), instances, ["traffic light"])
    (output,) = outputs
    picture, renderer = output.ax.get_window_extent(), output.canvas.get_renderer()
    texts = [label.get_window_extent(renderer) for label in output.ax.texts]
    assert len(texts) == 5
    assert all(picture.x0 <= t.x0 and t.x1 <= picture.x1 and picture.y0 <= t.y0 and t.y1 <= picture.y1 for t in texts)
