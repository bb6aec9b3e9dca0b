"""samdetr.analysis.thresholds: precision and recall at each score threshold."""

import numpy as np
import pytest

from helpers import make_results, random_results
from samdetr.analysis import match, read_results, threshold_curves

BOX, FAR = [0, 0, 10, 10], [50, 50, 10, 10]


def test_by_hand():
    """Of class "a", two objects: found at 0.8 and 0.4, and a false detection at 0.6; "b" has nothing."""
    detections = [(1, 1, BOX, 0.8), (1, 1, FAR, 0.6), (2, 1, BOX, 0.4)]
    curves = threshold_curves(read_results(*make_results([(1, 1, BOX), (2, 1, BOX)], detections)))

    def at(threshold):
        index = np.abs(curves.thresholds - threshold).argmin()
        return [values[0, index] for values in (curves.precision, curves.recall, curves.f1)]

    assert at(0.4) == pytest.approx([2 / 3, 1, 0.8])
    assert at(0.5) == pytest.approx([1 / 2, 1 / 2, 1 / 2])
    assert at(0.8) == pytest.approx([1, 1 / 2, 2 / 3])
    assert at(0.9) == pytest.approx([np.nan, 0, 0], nan_ok=True)
    assert curves.best.tolist() == [0, -1, 0] and np.isnan(curves.recall[1]).all()  # 0.8 from 0 to 0.4


def test_the_best_threshold_leaves_out_what_is_false():
    detections = [(1, 1, BOX, 0.8), (1, 1, FAR, 0.3)]
    curves = threshold_curves(read_results(*make_results([(1, 1, BOX)], detections)))
    best = curves.best[0]
    assert curves.thresholds[best] == pytest.approx(0.305) and curves.f1[0, best] == 1


@pytest.mark.parametrize("seed", range(3))
def test_it_is_what_is_counted_when_detections_below_are_dropped(seed):
    results = read_results(*random_results(seed))
    curves = threshold_curves(results)
    for index in range(0, len(curves.thresholds), 7):
        kept = results.above(curves.thresholds[index])
        matches = match(kept)
        for label in range(len(results.class_names)):
            counted = (kept.detection_class == label) & ~matches.ignored
            found, number = (matches.objects[counted] >= 0).sum(), results.object_counts()[label]
            assert curves.recall[label, index] == pytest.approx(found / number)
            if counted.any():
                assert curves.precision[label, index] == pytest.approx(found / counted.sum())
            else:
                assert np.isnan(curves.precision[label, index])
        counted = ~matches.ignored
        found = (matches.objects >= 0).sum()
        assert curves.f1[-1, index] == pytest.approx(2 * found / (counted.sum() + results.object_counts().sum()))
