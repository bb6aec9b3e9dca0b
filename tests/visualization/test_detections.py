"""samdetr.visualization.detections: only what is confident is drawn, and labels can be read."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import VisImage

from samdetr.visualization import draw_annotations, draw_detections, draw_pairs


def test_only_confident_detections_are_drawn():
    image = np.zeros((64, 64, 3), np.uint8)
    instances = Instances((64, 64))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5, 30, 30], [40, 40, 60, 60]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.2]), torch.tensor([0, 1])
    drawn = draw_detections(image, instances, ["a", "b"], 0.5)
    half = drawn.shape[0] // 2
    assert drawn[:half, :half].any() and not drawn[half + 20 :, half + 20 :].any()
    height, width, _ = drawn.shape
    taller = np.pad(drawn, ((0, 7), (0, 0), (0, 0)))
    assert draw_pairs([(drawn, taller)]).shape == (height + 7 + 8, 2 * width + 2 + 8, 3)  # a frame of 4 around them
    sheet = draw_pairs([(drawn, drawn)] * 3, columns=2)
    assert sheet.shape == (2 * (drawn.shape[0] + 8), 2 * (2 * drawn.shape[1] + 10), 3)


def drawn_texts(monkeypatch, draw, *arguments):
    """Draw; return the picture's edges and those of each label, (x0, y0, x1, y1) each, with its black box."""
    outputs = []
    monkeypatch.setattr(VisImage, "get_image", lambda self: outputs.append(self))
    draw(*arguments)
    (output,) = outputs
    output.canvas.draw()
    boxes = [label.get_bbox_patch() for label in output.ax.texts]
    return output.ax.get_window_extent().extents, [box.get_window_extent().extents for box in boxes]


CORNERS = [[100.0, 2, 127, 60], [2, 100, 30, 127], [60, 110, 127, 127], [0, 0, 12, 12], [120, 120, 128, 128]]


@pytest.mark.parametrize("what", ["detections", "tracks", "annotations"])
def test_labels_stay_inside_the_picture(what, monkeypatch):
    image = np.zeros((128, 128, 3), np.uint8)
    if what == "annotations":
        annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in CORNERS]
        picture, texts = drawn_texts(
            monkeypatch, draw_annotations, image, {"annotations": annotations}, ["traffic light"]
        )
    else:
        instances = Instances((128, 128), pred_boxes=Boxes(torch.tensor(CORNERS)), scores=torch.ones(5))
        instances.pred_classes = torch.zeros(5, dtype=torch.long)
        if what == "tracks":
            instances.track_ids = torch.arange(5)
        picture, texts = drawn_texts(monkeypatch, draw_detections, image, instances, ["traffic light"])
    assert len(texts) == 5
    for x0, y0, x1, y1 in texts:
        assert picture[0] <= x0 and x1 <= picture[2] and picture[1] <= y0 and y1 <= picture[3]


def test_a_label_wider_than_the_picture_can_be_read_from_its_beginning(monkeypatch):
    instances = Instances((128, 128), pred_boxes=Boxes(torch.tensor(CORNERS[:1])), scores=torch.ones(1))
    instances.pred_classes = torch.zeros(1, dtype=torch.long)
    image = np.zeros((128, 128, 3), np.uint8)
    picture, ((x0, _, x1, _),) = drawn_texts(monkeypatch, draw_detections, image, instances, ["a long name " * 9])
    assert picture[0] <= x0 < picture[0] + 5 and x1 > picture[2]
