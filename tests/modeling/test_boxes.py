"""samdetr.modeling.boxes against torchvision."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou, generalized_box_iou

from samdetr.modeling.boxes import cxcywh_to_xyxy, generalized_iou, iou, offsets_in_boxes, xyxy_to_cxcywh


def random_boxes(n):
    corners = torch.rand(n, 2, 2).sort(1).values
    return corners.flatten(1)


def test_conversions_by_hand_and_back():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    assert torch.allclose(cxcywh_to_xyxy(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)


def test_generalized_iou_of_all_pairs_is_torchvisions():
    a, b = random_boxes(7), random_boxes(5)
    assert torch.allclose(generalized_iou(a[:, None], b), generalized_box_iou(a, b), atol=1e-6)


def test_iou_of_all_pairs_is_torchvisions():
    a, b = random_boxes(7), random_boxes(5)
    assert torch.allclose(iou(a[:, None], b), box_iou(a, b), atol=1e-6)
    assert iou(torch.full((4,), 0.5), torch.full((4,), 0.5)) == 0  # without area


def test_generalized_iou_by_hand():
    a = torch.tensor([0.0, 0.0, 2.0, 2.0])
    b = torch.tensor([1.0, 1.0, 3.0, 3.0])
    assert torch.isclose(generalized_iou(a, b), torch.tensor(1 / 7 - 2 / 9))


def test_offsets_in_boxes_move_centres_by_shares_of_the_size():
    boxes = torch.tensor([[0.5, 0.3, 0.02, 0.04], [0.05, 0.94, 0.1, 0.1]], requires_grad=True)
    offsets = torch.tensor([[0.5, -0.25, 0.1, 0.0], [0.1, 0.05, 0.0, -0.1]], requires_grad=True)
    moved = (boxes.logit() + offsets_in_boxes(offsets, boxes)).sigmoid()
    assert torch.allclose(moved[:, :2], (boxes + offsets * boxes[:, [2, 3, 2, 3]])[:, :2], atol=2e-3)
    assert torch.equal(moved[:, 2:], (boxes.logit() + offsets)[:, 2:].sigmoid())
    assert torch.autograd.grad(offsets_in_boxes(offsets, boxes).sum(), boxes, allow_unused=True)[0] is None


def test_offsets_of_boxes_that_reach_far_out_of_the_image_stay_bounded():
    boxes = torch.tensor([[0.0, 1.0, 1.0, 1.0], [1e-9, 0.999, 0.5, 0.9]])
    steps = offsets_in_boxes(torch.ones(2, 4), boxes)
    assert torch.equal(steps[:, :2], torch.full((2, 2), 4.0)) and torch.equal(steps[:, 2:], torch.ones(2, 2))


def test_boxes_without_area_give_finite_values_and_gradients():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = generalized_iou(point, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    value.sum().backward()
    assert value.isfinite().all() and point.grad.isfinite().all()


box = st.tuples(*[st.floats(0, 1, width=32)] * 4).map(
    lambda c: [min(c[0], c[2]), min(c[1], c[3]), *map(max, c[:2], c[2:])]
)


@settings(max_examples=200, deadline=None)
@given(box, box)
def test_generalized_iou_is_symmetric_and_bounded_for_any_boxes(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    value = generalized_iou(a, b)
    assert -1.001 <= value <= 1.001
    assert torch.isclose(value, generalized_iou(b, a), atol=1e-6)
    if (a[2:] - a[:2]).min() > 1e-3:
        assert torch.isclose(generalized_iou(a, a), torch.tensor(1.0), atol=1e-4)
