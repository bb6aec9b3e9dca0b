"""samdetr.modeling.criterion against a plain loop over layers, images and queries."""

import math

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from helpers import make_matcher, make_problem
from oracles import plain_losses
from samdetr.modeling.boxes import cxcywh_to_xyxy
from samdetr.modeling.criterion import NonFinitePredictionError, SetCriterion
from samdetr.modeling.structures import DenoisingTargets


def make_criterion(**options):
    weights = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
    return SetCriterion(matcher=make_matcher(), **weights, focal_alpha=0.25, focal_gamma=2.0, **options)


def losses_of(predictions, targets, denoising=None, criterion=None):
    """The losses of a batch that is on one process and in one part."""
    num_denoising = 0
    if denoising is not None:
        real = denoising.valid if denoising.negative is None else denoising.valid & ~denoising.negative
        num_denoising = int(real.sum())
    normalizers = SetCriterion.normalizers(sum(map(len, targets)), num_denoising, torch.device("cpu"))
    return (criterion or make_criterion())(predictions, targets, denoising, normalizers)


def test_matching_losses_equal_the_loop():
    predictions, targets = make_problem((3, 0, 5), layers=3)
    logits, boxes = predictions.logits, predictions.boxes
    losses = losses_of(predictions, targets)
    matches = make_matcher()(predictions, targets)
    labels = torch.cat([target.labels for target in targets]).tolist()
    target_boxes = torch.cat([target.boxes for target in targets])
    for layer, suffix in enumerate(("_0", "_1", "")):
        expected = torch.zeros(3)
        for image in range(3):
            of_image = matches.image == image
            pairs = {
                q: (labels[t], target_boxes[t])
                for q, t in zip(matches.query[layer, of_image].tolist(), matches.target[layer, of_image].tolist())
            }
            expected += plain_losses(logits[layer, image], boxes[layer, image], pairs)
        found = torch.stack([losses[f"loss_{name}{suffix}"] for name in ("class", "l1", "giou")])
        assert torch.allclose(found, expected / 8, rtol=1e-4)
    assert len(losses) == 9


def test_denoising_losses_equal_the_loop():
    predictions, targets = make_problem((2, 1), layers=2, queries=4 + 6)
    logits, boxes = predictions.logits, predictions.boxes
    valid = torch.tensor([[True] * 6, [True, False, False, True, False, False]])
    denoising = DenoisingTargets(torch.randint(4, (2, 6)), torch.rand(2, 6, 4) * 0.5 + 0.2, valid)
    losses = losses_of(predictions, targets, denoising)
    only_matching = losses_of(predictions.of_queries(slice(4)), targets)
    assert all(torch.equal(losses[name], value) for name, value in only_matching.items())
    for layer, suffix in enumerate(("_0", "")):
        expected = torch.zeros(3)
        for image in range(2):
            real = [d for d in range(6) if valid[image, d]]
            pairs = {i: (denoising.labels[image, d].item(), denoising.boxes[image, d]) for i, d in enumerate(real)}
            queries = [4 + d for d in real]
            expected += plain_losses(logits[layer, image, queries], boxes[layer, image, queries], pairs)
        found = torch.stack([losses[f"loss_dn_{name}{suffix}"] for name in ("class", "l1", "giou")])
        assert torch.allclose(found, expected / 8, rtol=1e-4)


def test_negatives_teach_background_only():
    predictions, targets = make_problem((2, 1), layers=2, queries=4 + 4)
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    negative = torch.tensor([False, False, True, True])
    boxes = torch.rand(2, 4, 4) * 0.5 + 0.2
    denoising = DenoisingTargets(torch.randint(4, (2, 4)), boxes, valid, negative=negative)
    losses = losses_of(predictions, targets, denoising)
    for layer, suffix in enumerate(("_0", "")):
        expected = torch.zeros(3)
        for image in range(2):
            real = [d for d in range(4) if valid[image, d]]
            pairs = {
                i: (denoising.labels[image, d].item(), boxes[image, d]) for i, d in enumerate(real) if not negative[d]
            }
            queries = [4 + d for d in real]
            expected += plain_losses(
                predictions.logits[layer, image, queries], predictions.boxes[layer, image, queries], pairs
            )
        found = torch.stack([losses[f"loss_dn_{name}{suffix}"] for name in ("class", "l1", "giou")])
        assert torch.allclose(found, expected / 3, rtol=1e-4)


def test_denoising_gradients_equal_a_plain_formulation():
    predictions, targets = make_problem((1, 1), layers=1, queries=3 + 2)
    logits, boxes = predictions.logits, predictions.boxes
    logits.requires_grad_()
    boxes.requires_grad_()
    valid = torch.tensor([[True, True], [True, False]])
    denoising = DenoisingTargets(torch.randint(4, (2, 2)), torch.rand(2, 2, 4) * 0.5 + 0.2, valid)
    losses = losses_of(predictions, targets, denoising)
    sum(loss for name, loss in losses.items() if "_dn_" in name).backward()
    other_logits, other_boxes = logits.detach().clone().requires_grad_(), boxes.detach().clone().requires_grad_()
    total = 0.0
    for image, slot in ((0, 0), (0, 1), (1, 0)):
        box, target = other_boxes[0, image, 3 + slot], denoising.boxes[image, slot]
        total = total + 5 * (box - target).abs().sum()
        total = total + 2 * (1 - generalized_box_iou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(target[None]))[0, 0])
        p = other_logits[0, image, 3 + slot].sigmoid()
        positive = torch.arange(4) == denoising.labels[image, slot]
        total = total + 2 * torch.where(positive, 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()).sum()
    (total / 3).backward()
    assert torch.allclose(logits.grad, other_logits.grad, atol=1e-5)
    assert torch.allclose(boxes.grad, other_boxes.grad, atol=1e-4)
    assert not boxes.grad[0, 1, 4].any()  # the padding slot


def test_scores_that_are_aware_of_the_iou():
    """Matching and denoising queries against a loop over classes; the target has no gradient."""
    predictions, targets = make_problem((2, 1), layers=2, queries=4 + 3)
    logits = predictions.logits.requires_grad_()
    valid = torch.tensor([[True, True, False], [True, False, False]])
    denoising = DenoisingTargets(torch.randint(4, (2, 3)), torch.rand(2, 3, 4) * 0.5 + 0.2, valid)
    losses = losses_of(predictions, targets, denoising, make_criterion(iou_aware=True))
    matches = make_matcher()(predictions.of_queries(slice(4)), targets)
    labels, boxes = (torch.cat([getattr(target, name) for target in targets]) for name in ("labels", "boxes"))

    def expected(layer, image, query, label, box):
        found = logits[layer, image, query].sigmoid()
        total = 0.0
        for k in range(4):
            p, target, weight = found[k], 0.0, found[k] ** 2
            if k == label:
                corners = [cxcywh_to_xyxy(x[None]) for x in (predictions.boxes[layer, image, query], box)]
                target, weight = (p.detach() ** 0.25 * box_iou(*corners)[0, 0] ** 0.75).clamp(min=0.01), 1.0
            total = total - weight * (target * p.log() + (1 - target) * (1 - p).log())
        return 2 * total

    total = 0.0
    for layer, suffix in enumerate(("_0", "")):
        matching = {
            (image, query): (labels[target], boxes[target])
            for image, query, target in zip(
                matches.image.tolist(), matches.query[layer].tolist(), matches.target[layer].tolist()
            )
        }
        value = sum(
            expected(layer, image, query, *matching.get((image, query), (None, None)))
            for image in range(2)
            for query in range(4)
        )
        assert torch.isclose(losses[f"loss_class{suffix}"], value / 3, rtol=1e-4)
        total = total + value / 3
        value = sum(
            expected(layer, image, 4 + slot, denoising.labels[image, slot], denoising.boxes[image, slot])
            for image, slot in valid.nonzero().tolist()
        )
        assert torch.isclose(losses[f"loss_dn_class{suffix}"], value / 3, rtol=1e-4)
        total = total + value / 3
    (gradient,) = torch.autograd.grad(sum(loss for name, loss in losses.items() if "class" in name), logits)
    (plain,) = torch.autograd.grad(total, logits)
    assert torch.allclose(gradient, plain, atol=1e-5)


@pytest.mark.parametrize("with_denoising", [False, True])
def test_without_boxes_every_loss_is_finite_and_reaches_every_prediction(with_denoising):
    predictions, targets = make_problem((0, 0))
    logits, boxes = predictions.logits, predictions.boxes
    logits.requires_grad_()
    boxes.requires_grad_()
    denoising = None
    if with_denoising:
        empty = torch.zeros(2, 0)
        denoising = DenoisingTargets(empty.long(), torch.zeros(2, 0, 4), empty.bool())
    losses = losses_of(predictions, targets, denoising)
    assert len(losses) == (12 if with_denoising else 6)
    sum(losses.values()).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().min() > 0
    assert not boxes.grad.any()


def test_gradients_equal_those_of_a_plain_formulation():
    """Elementwise torch expressions, without the batched indexing."""
    predictions, targets = make_problem((2, 3), layers=2)
    logits, boxes = predictions.logits, predictions.boxes
    logits.requires_grad_()
    boxes.requires_grad_()
    sum(losses_of(predictions, targets).values()).backward()
    other_logits, other_boxes = logits.detach().clone().requires_grad_(), boxes.detach().clone().requires_grad_()
    matches = make_matcher()(predictions, targets)
    labels = torch.cat([target.labels for target in targets])
    target_boxes = torch.cat([target.boxes for target in targets])
    total = 0.0
    for layer in range(2):
        positive = torch.zeros(other_logits.shape[1:], dtype=torch.bool)
        for image, query, target in zip(matches.image, matches.query[layer], matches.target[layer]):
            positive[image, query, labels[target]] = True
            box = other_boxes[layer, image, query]
            total = total + 5 * (box - target_boxes[target]).abs().sum()
            giou = generalized_box_iou(cxcywh_to_xyxy(box[None]), cxcywh_to_xyxy(target_boxes[target][None]))
            total = total + 2 * (1 - giou[0, 0])
        p = other_logits[layer].sigmoid()
        focal = torch.where(positive, 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log())
        total = total + 2 * focal.sum()
    (total / 5).backward()
    assert torch.allclose(logits.grad, other_logits.grad, atol=1e-5)
    assert torch.allclose(boxes.grad, other_boxes.grad, atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_raise_or_show_in_the_losses(value):
    predictions, targets = make_problem()
    predictions.boxes[1, 2, 4, 0] = value
    criterion = make_criterion()
    with pytest.raises(NonFinitePredictionError) as error:
        losses_of(predictions, targets, criterion=criterion)
    assert error.value.image_index == 2
    criterion.raise_on_non_finite = False
    predictions.boxes[1] = value
    assert not losses_of(predictions, targets, criterion=criterion)["loss_l1"].isfinite()
