"""samdetr.analysis.matching: objects are found as pycocotools finds them."""

import numpy as np
import pytest

from helpers import make_results, random_results
from oracles import cocoeval
from samdetr.analysis import match, overlaps, read_results
from samdetr.errors import UserError


def test_detections_are_in_the_order_of_their_scores():
    truth, detections = make_results(
        [], [(2, 1, [0, 0, 1, 1], 0.5), (1, 2, [0, 0, 2, 2], 0.5), (1, 1, [0, 0, 3, 3], 0.9)]
    )
    results = read_results(truth, detections)
    assert results.scores.tolist() == [0.9, 0.5, 0.5]
    assert results.detection_image.tolist() == [0, 0, 1] and results.detection_class.tolist() == [0, 1, 0]
    assert results.detection_boxes[:, 2].tolist() == [3, 2, 1]
    assert results.above(0.6).scores.tolist() == [0.9] and len(results.above(0.5).scores) == 3


def test_ids_may_be_texts_and_categories_stand_in_any_order():
    truth = {"images": [{"id": "b"}, {"id": "a"}], "categories": [{"id": 7, "name": "x"}, {"id": 3, "name": "y"}]}
    results = read_results(truth, [{"image_id": "b", "category_id": 7, "bbox": [0, 0, 1, 1], "score": 1.0}])
    assert results.class_names == ["y", "x"] and results.image_ids == ["a", "b"]
    assert results.detection_image.tolist() == [1] and results.detection_class.tolist() == [1]
    assert results.object_counts().tolist() == [0, 0]


@pytest.mark.parametrize(("entry", "what"), [((9, 1), "image 9"), ((1, 9), "category 9")])
def test_detections_of_something_else_are_refused(entry, what):
    with pytest.raises(UserError, match=f"{what}, which is not in the ground truth"):
        read_results(*make_results([], [(*entry, [0, 0, 1, 1], 0.5)]))


def test_overlaps_by_hand():
    """IoU of two boxes that are half apart is a third; a crowd region counts what of the detection is inside."""
    objects = [(1, 1, [0, 0, 10, 10]), (1, 1, [0, 0, 100, 100], 1)]
    results = read_results(*make_results(objects, [(1, 1, [5, 0, 10, 10], 0.5), (2, 1, [5, 0, 10, 10], 0.4)]))
    first, second = overlaps(results)
    assert first[0].tolist() == [0] and first[1].tolist() == [0, 1]
    assert first[2] == pytest.approx(np.array([[1 / 3, 1]]))
    assert second[0].tolist() == [1] and second[2].shape == (1, 0)


@pytest.mark.parametrize("seed", range(5))
def test_matches_are_those_of_pycocotools(seed):
    truth, detections = random_results(seed)
    results = read_results(truth, detections)
    matches = match(results)
    expected = []
    evaluation = cocoeval(truth, detections)
    scores = {entry["id"]: entry["score"] for entry in evaluation.cocoDt.anns.values()}
    for found in evaluation.evalImgs:
        if found is not None and found["aRng"] == [0, 1e10]:
            for detection, matched, ignored in zip(found["dtIds"], found["dtMatches"][0], found["dtIgnore"][0]):
                row = (found["image_id"], found["category_id"], scores[detection])
                expected.append((*row, -1 if ignored else int(matched) - 1, bool(ignored)))
    columns = (
        results.detection_image + 1,
        results.detection_class + 1,
        results.scores,
        matches.objects,
        matches.ignored,
    )
    assert matches.ignored.any() and (matches.objects >= 0).sum() > 5
    assert sorted(zip(*(column.tolist() for column in columns))) == sorted(expected)
