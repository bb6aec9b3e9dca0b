"""samdetr.modeling.matcher against a loop over images and layers, and by hand."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from helpers import make_matcher, make_problem
from oracles import plain_cost
from samdetr.modeling.structures import Predictions
from samdetr.ops.blocks import resized_blocks


def test_costs_and_assignment_equal_the_loops():
    predictions, targets = make_problem()
    matcher = make_matcher()
    matches = matcher(predictions, targets)
    costs = matcher.costs(predictions, targets)
    assert matches.image.tolist() == [0] * 3 + [2] * 5 and costs.shape == (8, 2, 8)
    for layer in range(2):
        for image, first_box in ((0, 0), (2, 3)):
            expected_cost = plain_cost(
                predictions.logits[layer, image], predictions.boxes[layer, image], targets[image]
            )
            cost = costs[first_box : first_box + len(targets[image]), layer].T
            assert torch.allclose(cost, expected_cost, atol=1e-4)
            rows, columns = linear_sum_assignment(expected_cost.numpy())
            of_image = matches.image == image
            pairs = zip(matches.query[layer, of_image].tolist(), matches.target[layer, of_image].tolist())
            assert sorted(pairs) == sorted(zip(rows.tolist(), (columns + first_box).tolist()))


def test_costs_block_by_block_are_those_at_once():
    problem = make_problem()
    at_once = make_matcher().costs(*problem)
    with resized_blocks(3 * 32 * 2 * 8):
        assert torch.allclose(make_matcher().costs(*problem), at_once, atol=1e-6)


def test_a_match_does_not_depend_on_the_batch():
    predictions, targets = make_problem((4, 2))
    together = make_matcher()(predictions, targets)
    alone = make_matcher()(Predictions(predictions.logits[:, 1:], predictions.boxes[:, 1:]), targets[1:])
    assert torch.equal(together.query[:, together.image == 1], alone.query)
    assert torch.equal(together.target[:, together.image == 1] - 4, alone.target)


def test_many_boxes_among_very_many_candidates():
    """Only the cheapest candidates of each box are looked at, and the total cost is the smallest all the same."""
    predictions, targets = make_problem((20,), layers=2, queries=1000)
    predictions.logits[..., :50, :] += 5  # candidates that every box wants
    matcher = make_matcher()
    matches, costs = matcher(predictions, targets), matcher.costs(predictions, targets)
    for layer in range(2):
        rows, columns = linear_sum_assignment(costs[:, layer].numpy())
        queries, boxes = matches.query[layer], matches.target[layer]
        assert len(queries.unique()) == len(boxes.unique()) == 20
        assert torch.isclose(costs[boxes, layer, queries].sum(), costs[rows, layer, columns].sum(), rtol=1e-6)


def test_more_boxes_than_queries():
    matches = make_matcher()(*make_problem((11,), queries=3))
    assert matches.query.shape == (2, 3)
    assert sorted(matches.query[0].tolist()) == [0, 1, 2]


def test_one_box_to_the_cheapest_candidates():
    predictions, targets = make_problem((3, 0, 5), layers=1, queries=20)
    matches = make_matcher().one_to_many(predictions, targets, number=4)
    assert matches.image.tolist() == [0] * 12 + [2] * 20
    assert matches.target[0].tolist() == [box for box in range(8) for _ in range(4)]
    for box in range(8):
        image, index = (0, box) if box < 3 else (2, box - 3)
        cost = plain_cost(predictions.logits[0, image], predictions.boxes[0, image], targets[image])[:, index]
        assert sorted(matches.query[0, 4 * box : 4 * box + 4].tolist()) == sorted(cost.argsort()[:4].tolist())


def test_no_boxes_at_all():
    matches = make_matcher()(*make_problem((0, 0)))
    assert matches.image.shape == (0,) and matches.query.shape == matches.target.shape == (2, 0)
    many = make_matcher().one_to_many(*make_problem((0, 0), layers=1), number=4)
    assert many.image.shape == (0,) and many.query.shape == many.target.shape == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_reported(value):
    """They are assigned all the same, so that the losses show them."""
    predictions, targets = make_problem()
    predictions.boxes[1, 2, 4, 0] = value
    matches = make_matcher()(predictions, targets)
    assert matches.finite == [True, True, False] and matches.query.shape == (2, 8)
