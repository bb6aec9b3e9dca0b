"""samdetr.analysis.errors: TIDE's kinds of errors, and what they cost."""

from collections import Counter

import numpy as np
import pytest

from helpers import make_results, random_results
from oracles import cocoeval
from samdetr.analysis import ERROR_KINDS, class_ap, error_costs, overlaps, read_results, split_errors

BOX, FAR = [0, 0, 10, 10], [500, 500, 10, 10]
NEAR, HALF, TOUCHING = [2, 0, 10, 10], [5, 0, 10, 10], [9, 0, 10, 10]  # IoU with BOX: 2/3, 1/3, 1/19
NONE = dict.fromkeys(ERROR_KINDS, 0)


def analysed(objects, detections, **options):
    results = read_results(*make_results(objects, detections, **options))
    split = split_errors(results)
    return split, *error_costs(results, split)


@pytest.mark.parametrize(
    ("detection", "kind", "state"),
    [
        ((1, 1, NEAR, 0.9), "correct", "found"),
        ((1, 2, NEAR, 0.9), "classification", "mistaken"),
        ((1, 1, HALF, 0.9), "localisation", "mistaken"),
        ((1, 2, HALF, 0.9), "both", "missed"),
        ((1, 1, TOUCHING, 0.9), "background", "missed"),
        ((1, 2, TOUCHING, 0.9), "background", "missed"),
        ((2, 1, BOX, 0.9), "background", "missed"),  # in another image
    ],
)
def test_the_kind_of_one_detection_of_one_object(detection, kind, state):
    split, _, _ = analysed([(1, 1, BOX)], [detection])
    assert split.detection_kinds.tolist() == [kind] and split.object_kinds.tolist() == [state]
    assert split.about.tolist() == [-1 if kind == "background" else 0]
    expected = {**NONE, **({} if kind == "correct" else {kind: 1})}
    assert split.counts() == {**expected, "missed": int(state == "missed")}


def test_duplicates():
    split, _, _ = analysed([(1, 1, BOX)], [(1, 1, NEAR, 0.8), (1, 1, BOX, 0.7), (1, 1, BOX, 0.9)])
    assert split.detection_kinds.tolist() == ["correct", "duplicate", "duplicate"]
    assert split.about.tolist() == [0, 0, 0] and split.counts() == {**NONE, "duplicate": 2}


def test_what_two_objects_make_possible():
    """A near object of its own class and one of another class: localisation comes first, then classification."""
    objects = [(1, 1, BOX), (1, 2, HALF)]
    split, _, _ = analysed(objects, [(1, 1, HALF, 0.9)])  # IoU 1/3 with its own class, 1 with the other
    assert split.detection_kinds.tolist() == ["localisation"] and split.about.tolist() == [0]
    assert split.object_kinds.tolist() == ["mistaken", "missed"]
    objects = [(1, 1, BOX), (1, 2, NEAR)]
    split, _, _ = analysed(objects, [(1, 1, BOX, 0.9), (1, 1, NEAR, 0.8)])
    assert split.detection_kinds.tolist() == ["correct", "classification"] and split.about.tolist() == [0, 1]


def test_crowd_regions():
    """A detection in one of its class is ignored, for one of another class it is background."""
    split, ap, costs = analysed([(1, 1, [0, 0, 30, 30], 1), (1, 1, FAR)], [(1, 1, BOX, 0.9), (1, 2, BOX, 0.8)])
    assert split.detection_kinds.tolist() == ["ignored", "background"]
    assert split.object_kinds.tolist() == ["crowd", "missed"] and split.counts() == {
        **NONE,
        "background": 1,
        "missed": 1,
    }
    assert ap == 0 and costs["background"] == 0


def test_cost_of_classification():
    """ "b" at 0.9 should be "a": AP of "a" is 0, of "b" 1/2; corrected, both are 1."""
    _, ap, costs = analysed([(1, 1, BOX), (2, 2, BOX)], [(1, 2, BOX, 0.9), (2, 2, BOX, 0.5)])
    assert ap == pytest.approx(25) and costs == pytest.approx({**NONE, "classification": 75})


@pytest.mark.parametrize("kind", ["localisation", "classification"])
def test_of_two_detections_of_an_object_the_one_with_the_higher_score_is_kept(kind):
    """The error at 0.9 is corrected, the right detection at 0.5 is dropped, and the false one at 0.7 comes second."""
    wrong = (1, 1, HALF, 0.9) if kind == "localisation" else (1, 2, BOX, 0.9)
    _, ap, costs = analysed([(1, 1, BOX)], [wrong, (1, 1, FAR, 0.7), (1, 1, BOX, 0.5)], class_names="ab")
    before = {"localisation": 100 / 3, "classification": 50}[kind]
    assert ap == pytest.approx(before) and costs[kind] == pytest.approx(100 - before)
    _, _, costs = analysed([(1, 1, BOX)], [(1, 1, BOX, 0.9), (1, 1, FAR, 0.7), (*wrong[:3], 0.5)])
    assert costs == pytest.approx(NONE)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("duplicate", (1, 1, NEAR, 0.8)), ("background", (1, 1, FAR, 0.8)), ("both", (1, 1, [45, 40, 10, 10], 0.8))],
)
def test_cost_of_what_is_removed(kind, wrong):
    """Right, wrong, right: precision is 1 for the first 51 steps of recall and 2/3 for the other 50."""
    objects = [(1, 1, BOX), (2, 1, BOX), (1, 2, [40, 40, 10, 10])]
    detections = [(1, 1, BOX, 0.9), wrong, (2, 1, BOX, 0.7), (1, 2, [40, 40, 10, 10], 0.6)]
    split, ap, costs = analysed(objects, detections)
    lost = 100 * 50 / 3 / 101 / 2  # of one of two classes
    assert split.counts() == {**NONE, kind: 1}
    assert ap == pytest.approx(100 - lost) and costs == pytest.approx({**NONE, kind: lost})


def test_cost_of_what_is_missed():
    """One object of two: precision is 1 for 51 of 101 steps. Without the one that is missed, AP is 100."""
    split, ap, costs = analysed([(1, 1, BOX), (2, 1, BOX)], [(1, 1, BOX, 0.9)])
    assert split.object_kinds.tolist() == ["found", "missed"]
    assert ap == pytest.approx(5100 / 101) and costs == pytest.approx({**NONE, "missed": 5000 / 101})


def test_without_objects_or_detections():
    split, ap, costs = analysed([], [(1, 1, BOX, 0.9)])
    assert split.counts() == {**NONE, "background": 1} and np.isnan([ap, *costs.values()]).all()
    split, ap, costs = analysed([(1, 1, BOX)], [])
    assert split.counts() == {**NONE, "missed": 1} and ap == 0
    assert np.isnan(costs.pop("missed")) and not any(costs.values())  # no object is left


@pytest.mark.parametrize("seed", range(6))
def test_each_error_has_one_kind_which_fits_the_published_definition(seed):
    truth, detections = random_results(seed)
    results = read_results(truth, detections)
    split = split_errors(results)
    counts = Counter(split.detection_kinds.tolist())
    assert counts.total() == len(detections) and counts.keys() <= {"correct", "ignored", *ERROR_KINDS} - {"missed"}
    assert len(counts) == 7, counts  # each kind occurs
    false = len(detections) - counts["correct"] - counts["ignored"]
    states = Counter(split.object_kinds.tolist())
    assert sum(split.counts().values()) == false + states["missed"]
    assert states["found"] == counts["correct"] and states["crowd"] == results.crowd.sum()
    named = set(split.about[np.isin(split.detection_kinds, ("localisation", "classification"))].tolist())
    for rows, objects, iou in overlaps(results):
        for row, overlap in zip(rows, iou):
            real = [(o, x) for o, x in zip(objects, overlap) if not results.crowd[o]]
            same = [x for o, x in real if results.object_class[o] == results.detection_class[row]]
            other = [x for o, x in real if results.object_class[o] != results.detection_class[row]]
            own, wrong = max(same, default=0), max(other, default=0)
            found = [o for o, x in real if x == own and split.object_kinds[o] == "found"]
            assert {
                "correct": own >= 0.5,
                "ignored": any(results.crowd[objects]),
                "classification": wrong >= 0.5,
                "localisation": 0.1 <= own < 0.5,
                "both": 0.1 <= wrong < 0.5 and own < 0.1,
                "duplicate": own >= 0.5 and bool(found),
                "background": own < 0.1 and wrong < 0.1,
            }[str(split.detection_kinds[row])]
    for index, state in enumerate(split.object_kinds):
        found = index in split.about[split.detection_kinds == "correct"]
        expected = "crowd" if results.crowd[index] else "found" if found else "mistaken" if index in named else "missed"
        assert state == expected


@pytest.mark.parametrize("seed", range(3))
def test_ap_is_that_of_pycocotools_and_removing_errors_never_lowers_it(seed):
    truth, detections = random_results(seed)
    results = read_results(truth, detections)
    ap, costs = error_costs(results, split_errors(results))
    assert ap == pytest.approx(class_ap(cocoeval(truth, detections).eval["precision"])[:, 1].mean())
    assert min(costs.values()) >= 0 and max(costs.values()) > 1
