"""samdetr.analysis.confusion: which class is taken for which."""

import numpy as np
import pytest

from helpers import make_results, random_results
from samdetr.analysis import confusion_matrix, match, read_results

BOX, NEAR, FAR = [0, 0, 10, 10], [2, 0, 10, 10], [50, 50, 10, 10]  # IoU of the first two: 2/3


def test_by_hand():
    objects = [(1, 1, BOX), (1, 2, FAR), (2, 1, BOX), (2, 2, FAR)]
    detections = [
        (1, 1, BOX, 0.9),  # right
        (1, 1, NEAR, 0.8),  # again the same: background
        (1, 1, FAR, 0.7),  # "b" is taken for "a"
        (2, 2, BOX, 0.6),  # "a" is taken for "b"
        (2, 2, FAR, 0.1),  # right, but below the threshold: missed
    ]
    results = read_results(*make_results(objects, detections))
    assert confusion_matrix(results, 0.3).tolist() == [[1, 1, 0], [1, 0, 1], [1, 0, 0]]
    assert confusion_matrix(results, 0.05).tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert confusion_matrix(results, 1).tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_a_right_detection_comes_before_a_wrong_one_with_a_higher_score():
    detections = [(1, 2, BOX, 0.9), (1, 1, NEAR, 0.5)]
    results = read_results(*make_results([(1, 1, BOX)], detections))
    assert confusion_matrix(results, 0).tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_of_two_wrong_detections_the_one_with_the_higher_score_counts():
    detections = [(1, 2, NEAR, 0.9), (1, 3, BOX, 0.5)]
    results = read_results(*make_results([(1, 1, BOX)], detections, class_names="abc"))
    expected = np.zeros((4, 4), int)
    expected[0, 1] = expected[3, 2] = 1
    assert confusion_matrix(results, 0).tolist() == expected.tolist()


def test_crowd_regions_are_left_out():
    detections = [(1, 1, BOX, 0.9), (1, 1, NEAR, 0.8), (1, 2, BOX, 0.7)]
    results = read_results(*make_results([(1, 1, [0, 0, 30, 30], 1)], detections))
    assert confusion_matrix(results, 0).tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("seed", range(4))
def test_rows_sum_up_to_objects_and_columns_to_detections(seed):
    results = read_results(*random_results(seed))
    table, matches = confusion_matrix(results, 0.6), match(results.above(0.6))
    classes = len(results.class_names)
    detected = np.bincount(results.above(0.6).detection_class[~matches.ignored], minlength=classes)
    found = results.object_class[matches.objects[matches.objects >= 0]]
    assert table[:-1].sum(1).tolist() == results.object_counts().tolist()
    assert table[:, :-1].sum(0).tolist() == detected.tolist()
    assert table.diagonal()[:-1].tolist() == np.bincount(found, minlength=classes).tolist()
    assert table[:-1, :-1].sum() > table.diagonal().sum() and table[-1, -1] == 0
