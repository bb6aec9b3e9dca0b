"""samdetr.object_tracking: objects keep their numbers from frame to frame."""

import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from samdetr.errors import UserError
from samdetr.object_tracking import ObjectTracker

pytest.importorskip("trackers", reason="needs: pip install trackers")


def frame_of(*objects):
    """Detections of 20 x 20 pixels: (x, y, score) each, with a class that tells them apart."""
    instances = Instances((200, 200))
    corners = torch.tensor([[x, y, x + 20, y + 20] for x, y, _ in objects]).float().reshape(-1, 4)
    instances.pred_boxes = Boxes(corners)
    instances.scores = torch.tensor([score for *_, score in objects]).float()
    instances.pred_classes = instances.query_indices = torch.arange(len(objects))
    return instances


def ids_of(tracker, *objects):
    return tracker(frame_of(*objects)).track_ids.tolist()


def make_tracker(score_threshold=0.3):
    return ObjectTracker(score_threshold=score_threshold, frame_rate=10.0)


def test_objects_that_move_keep_their_numbers_in_whatever_order_they_are_found():
    tracker = make_tracker()
    assert ids_of(tracker, (0, 0, 0.9), (100, 100, 0.8)) == [-1, -1]  # one frame makes no track
    first, second = ids_of(tracker, (4, 0, 0.9), (96, 100, 0.8))
    assert sorted([first, second]) == [0, 1]
    for step in range(2, 12):
        left, right = (4 * step, 0, 0.9), (100 - 4 * step, 100, 0.8)
        if step % 2:
            assert ids_of(tracker, left, right) == [first, second]
        else:
            assert ids_of(tracker, right, left) == [second, first]


def test_a_detection_below_the_threshold_continues_a_track_and_begins_none():
    tracker = make_tracker()
    for _ in range(2):
        tracker(frame_of((50, 50, 0.9)))
    found = tracker(frame_of((50, 50, 0.15), (150, 150, 0.25)))
    assert found.track_ids.tolist() == [0] and found.scores.tolist() == pytest.approx([0.15])
    for _ in range(3):
        assert ids_of(tracker, (50, 50, 0.4), (150, 150, 0.25)) == [0]
    assert ids_of(tracker, (50, 50, 0.05)) == []  # less than ByteTrack's lower threshold
    assert ids_of(tracker, (50, 50, 0.4)) == [0]


def test_a_threshold_below_bytetracks_own_is_the_lowest_score():
    tracker = make_tracker(score_threshold=0.02)
    for expected in ([-1], [0], [0]):
        assert ids_of(tracker, (50, 50, 0.03), (120, 120, 0.01)) == expected


def test_an_object_is_remembered_for_a_second():
    def after(frames):
        tracker = make_tracker()
        for _ in range(3):
            tracker(frame_of((50, 50, 0.9)))
        for _ in range(frames):
            assert ids_of(tracker) == []
        return [*ids_of(tracker, (50, 50, 0.9)), *ids_of(tracker, (50, 50, 0.9))]

    assert after(frames=5) == [0, 0]
    assert after(frames=15) == [-1, 1]


def test_an_object_of_two_classes_has_one_number_whichever_is_the_better():
    """Both are of one query, whose box they share."""
    tracker = make_tracker()
    for number in range(4):
        frame = frame_of((0, 0, 0.6), (0, 0, 0.5), (100, 100, 0.4))
        frame.pred_classes = torch.tensor([[0, 1, 2], [1, 0, 2]][number % 2])
        frame.query_indices = torch.tensor([7, 7, 3])
        found = tracker(frame)
        assert found.track_ids.tolist() == ([-1, -1, -1] if number == 0 else [0, 0, 1])
        assert found.pred_classes.tolist() == frame.pred_classes.tolist()


def test_the_detections_keep_all_they_have():
    tracker = make_tracker()
    frame = frame_of((0, 0, 0.8), (100, 100, 0.9), (50, 150, 0.2))
    tracker(frame)
    found = tracker(frame)
    assert found.pred_classes.tolist() == [0, 1] and found.image_size == (200, 200)
    assert torch.equal(found.pred_boxes.tensor, frame.pred_boxes.tensor[:2])
    assert not frame.has("track_ids")  # the input is as it was


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(UserError, match="pip install trackers"):
        make_tracker()


def test_drawings_show_numbers_in_colours_that_stay():
    from samdetr.visualization import draw_detections

    black = np.zeros((200, 200, 3), np.uint8)

    def drawn(track_ids, score=0.9):
        frame = frame_of((50, 50, score))
        frame.track_ids = torch.tensor(track_ids)
        return draw_detections(black, frame, ["cat"])

    def colour_of_box(picture):
        return tuple(picture[int(picture.shape[0] * 0.3), int(picture.shape[1] * 0.25)].tolist())

    assert colour_of_box(drawn([3])) == colour_of_box(drawn([3], score=0.5)) != colour_of_box(drawn([4]))
    assert (drawn([3]) != drawn([23])).any()  # of the same colour, but of another number
    grey = colour_of_box(drawn([-1]))
    assert len(set(grey)) == 1 and grey[0] > 0
