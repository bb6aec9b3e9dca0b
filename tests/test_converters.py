"""samdetr.converters: the same detections, as other tools want them."""

import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from samdetr.converters import to_fiftyone, to_supervision
from samdetr.errors import UserError

NAMES = ["cat", "dog", "cow"]


def make_instances(boxes, scores, classes, size=(50, 200)):
    """Detections in an image of (height, width)."""
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes, dtype=torch.long)
    return instances


@pytest.fixture
def instances():
    return make_instances([[20, 10, 120, 35], [0, 0, 200, 50]], [0.75, 0.25], [2, 0])


@pytest.fixture
def fiftyone(monkeypatch):
    """A module with the classes of FiftyOne that are used, and their constructors' arguments."""

    @dataclass(kw_only=True)
    class Detection:
        label: str
        bounding_box: list
        confidence: float

    @dataclass(kw_only=True)
    class Detections:
        detections: list

    module = types.ModuleType("fiftyone")
    module.Detection, module.Detections = Detection, Detections
    monkeypatch.setitem(sys.modules, "fiftyone", module)
    return module


def test_supervision_gets_pixels_scores_and_names(instances):
    supervision = pytest.importorskip("supervision", reason="needs: pip install supervision")
    found = to_supervision(instances, NAMES)
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.tolist() == [[20, 10, 120, 35], [0, 0, 200, 50]]
    assert found.confidence.tolist() == [0.75, 0.25] and found.class_id.tolist() == [2, 0]
    assert found["class_name"].tolist() == ["cow", "cat"]


def test_supervision_draws_them_with_their_names(instances):
    """Its annotators take what they need; a label of another name is another picture."""
    supervision = pytest.importorskip("supervision", reason="needs: pip install supervision")
    black = np.zeros((50, 200, 3), np.uint8)
    drawn = [
        supervision.LabelAnnotator().annotate(black.copy(), to_supervision(instances, names))
        for names in (NAMES, NAMES, ["cat", "dog", "horse"])
    ]
    assert drawn[0].any() and (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).any()


def test_no_detections_are_an_empty_object(fiftyone):
    pytest.importorskip("supervision", reason="needs: pip install supervision")
    nothing = make_instances([], [], [])
    assert len(to_supervision(nothing, NAMES)) == 0
    assert to_fiftyone(nothing, NAMES) == fiftyone.Detections(detections=[])


def test_fiftyone_gets_relative_boxes_from_the_upper_left_corner(instances, fiftyone):
    first, second = to_fiftyone(instances, NAMES).detections
    assert (first.label, first.confidence) == ("cow", 0.75) and first.bounding_box == pytest.approx(
        [0.1, 0.2, 0.5, 0.5]
    )
    assert second == fiftyone.Detection(label="cat", bounding_box=[0, 0, 1, 1], confidence=0.25)


def test_a_missing_package_is_named(instances, monkeypatch):
    for package, convert in (("supervision", to_supervision), ("fiftyone", to_fiftyone)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            convert(instances, NAMES)
