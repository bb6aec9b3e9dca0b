"""samdetr.matcher against a loop over images and layers, and by hand."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import generalized_box_iou

from samdetr import layers
from samdetr.boxes import cxcywh_to_xyxy
from samdetr.matcher import HungarianMatcher, NonFinitePredictionError
from samdetr.structures import ImageTarget


def make_matcher():
    return HungarianMatcher(class_weight=2.0, l1_weight=5.0, giou_weight=2.0, focal_alpha=0.25, focal_gamma=2.0)


def make_problem(counts=(3, 0, 5), layers=2, queries=8, classes=4):
    logits = torch.randn(layers, len(counts), queries, classes)
    boxes = torch.rand(layers, len(counts), queries, 4) * 0.5 + 0.2
    targets = [ImageTarget(torch.randint(classes, (n,)), torch.rand(n, 4) * 0.5 + 0.2) for n in counts]
    return logits, boxes, targets


def plain_cost(logits, boxes, target):
    cost = torch.zeros(len(logits), len(target))
    for q in range(len(logits)):
        for t in range(len(target)):
            p = logits[q, target.labels[t]].sigmoid().item()
            cost[q, t] += 2 * (0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8))
            cost[q, t] += 5 * (boxes[q] - target.boxes[t]).abs().sum()
            pair = cxcywh_to_xyxy(boxes[q : q + 1]), cxcywh_to_xyxy(target.boxes[t : t + 1])
            cost[q, t] -= 2 * generalized_box_iou(*pair)[0, 0]
    return cost


def test_costs_and_assignment_equal_the_loops():
    logits, boxes, targets = make_problem()
    matcher = make_matcher()
    matches = matcher(logits, boxes, targets)
    costs = matcher.costs(logits, boxes, targets)
    assert matches.image.tolist() == [0] * 3 + [2] * 5 and costs.shape == (8, 2, 8)
    for layer in range(2):
        for image, first_box in ((0, 0), (2, 3)):
            expected_cost = plain_cost(logits[layer, image], boxes[layer, image], targets[image])
            cost = costs[first_box : first_box + len(targets[image]), layer].T
            assert torch.allclose(cost, expected_cost, atol=1e-4)
            rows, columns = linear_sum_assignment(expected_cost.numpy())
            of_image = matches.image == image
            pairs = zip(matches.query[layer, of_image].tolist(), matches.target[layer, of_image].tolist())
            assert sorted(pairs) == sorted(zip(rows.tolist(), (columns + first_box).tolist()))


def test_costs_block_by_block_are_those_at_once(monkeypatch):
    problem = make_problem()
    at_once = make_matcher().costs(*problem)
    monkeypatch.setitem(layers._BLOCK_ELEMENTS, "cpu", 3 * 32 * 2 * 8)
    assert torch.allclose(make_matcher().costs(*problem), at_once, atol=1e-6)


def test_a_match_does_not_depend_on_the_batch():
    logits, boxes, targets = make_problem((4, 2))
    together = make_matcher()(logits, boxes, targets)
    alone = make_matcher()(logits[:, 1:], boxes[:, 1:], targets[1:])
    assert torch.equal(together.query[:, together.image == 1], alone.query)
    assert torch.equal(together.target[:, together.image == 1] - 4, alone.target)


def test_more_boxes_than_queries():
    logits, boxes, targets = make_problem((11,), queries=3)
    matches = make_matcher()(logits, boxes, targets)
    assert matches.query.shape == (2, 3)
    assert sorted(matches.query[0].tolist()) == [0, 1, 2]


def test_no_boxes_at_all():
    matches = make_matcher()(*make_problem((0, 0)))
    assert matches.image.shape == (0,) and matches.query.shape == matches.target.shape == (2, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_name_the_image(value):
    logits, boxes, targets = make_problem()
    boxes[1, 2, 4, 0] = value
    with pytest.raises(NonFinitePredictionError) as error:
        make_matcher()(logits, boxes, targets)
    assert error.value.image_index == 2
