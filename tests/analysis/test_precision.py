"""samdetr.analysis.precision: the average precision of pycocotools."""

import contextlib
import io

import numpy as np
import pytest

from helpers import make_results, random_results
from oracles import cocoeval
from samdetr.analysis import average_precision, class_ap


def test_average_precision_by_hand():
    """Right, wrong, right, of three objects: precision 1 up to a recall of 1/3, 2/3 up to 2/3, then none."""
    assert average_precision(np.array([True, False, True]), 3) == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert average_precision(np.array([True, True]), 2) == 1
    assert average_precision(np.array([], bool), 2) == 0


def test_ap_of_each_class_and_size_is_that_of_pycocotools():
    truth, detections = random_results(3)
    found = class_ap(cocoeval(truth, detections).eval["precision"])
    assert found.shape == (3, 6) and (found[:, 0] > 0).all()
    for label, row in enumerate(found, 1):
        alone = {**truth, "categories": [entry for entry in truth["categories"] if entry["id"] == label]}
        alone["annotations"] = [entry for entry in truth["annotations"] if entry["category_id"] == label]
        evaluation = cocoeval(alone, [entry for entry in detections if entry["category_id"] == label])
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.summarize()
        expected = np.where(evaluation.stats[:6] < 0, np.nan, 100 * evaluation.stats[:6])
        assert row == pytest.approx(expected, nan_ok=True)


def test_classes_and_sizes_without_objects_have_no_ap():
    truth, detections = make_results([(1, 1, [0, 0, 40, 40])], [(1, 1, [0, 0, 40, 40], 0.5), (1, 2, [0, 0, 9, 9], 0.4)])
    nan = np.nan
    found = class_ap(cocoeval(truth, detections).eval["precision"])
    assert found == pytest.approx(np.array([[100, 100, 100, nan, 100, nan], [nan] * 6]), nan_ok=True)
