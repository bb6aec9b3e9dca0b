"""samdetr.modeling.pixel_head: predictions at every pixel against a loop, what is selected, and what the dense head teaches."""

import math

import pytest
import torch

from helpers import make_matcher
from oracles import plain_cost, plain_losses
from samdetr.modeling.criterion import SetCriterion
from samdetr.modeling.pixel_head import DenseHead, EncoderSelection
from samdetr.modeling.query_generator import LearnedQueryGenerator
from samdetr.modeling.structures import FeatureLevel, ImageTarget

OPTIONS = {"dim": 16, "num_classes": 4, "prior_prob": 0.01, "anchor_size": 0.2}


def make_levels(sizes=((4, 6), (2, 3)), valid=None, batch=2):
    """Random levels; the second image is valid in the upper left part ``valid`` of each level."""
    levels = []
    for i, (height, width) in enumerate(sizes):
        valid_size = torch.tensor([[height, width]] * batch).float()
        mask = None
        if valid is not None:
            rows, columns = valid[i]
            valid_size[1] = torch.tensor([rows, columns])
            mask = torch.zeros(batch, height, width, dtype=torch.bool)
            mask[1, rows:] = mask[1, :, columns:] = True
        features = torch.randn(batch, height, width, 16)
        levels.append(FeatureLevel(features, torch.zeros(1, height, width, 16), valid_size, mask))
    return levels


def make_head(kind, **options):
    """A head whose scores and boxes differ from pixel to pixel."""
    head = kind(**OPTIONS, **options)
    for layer in (head.class_head, head.box_head.layers[-1]):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return head


def plain_predictions(head, levels, image):
    """The logits and boxes of each valid pixel of an image, level by level and row by row."""
    found = []
    for index, level in enumerate(levels):
        rows, columns = (int(side) for side in level.valid_size[image])
        for i in range(rows):
            for j in range(columns):
                feature = head.norm(head.projection(level.features[image, i, j]))
                side = head.anchor_size * 2**index
                anchor = torch.tensor([(j + 0.5) / columns, (i + 0.5) / rows, side, side])
                box = torch.sigmoid(torch.log(anchor / (1 - anchor)) + head.box_head(feature))
                found.append((head.class_head(feature), box))
    return [torch.stack(values) for values in zip(*found)]


def test_every_pixel_predicts_from_its_own_place():
    head, levels = make_head(EncoderSelection), make_levels()
    predictions = head(levels)
    for image in range(2):
        logits, boxes = plain_predictions(head, levels, image)
        assert torch.allclose(predictions.logits[0, image], logits, atol=1e-5)
        assert torch.allclose(predictions.boxes[0, image], boxes, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_best_pixels_of_each_image_are_selected_and_padding_never_is(training):
    head = make_head(EncoderSelection).train(training)
    levels = make_levels(valid=[(3, 5), (2, 3)])
    selected, content, predictions = head.select(levels, num_queries=7)
    assert content is None
    assert selected.shape == (2, 7, 4) and not selected.requires_grad
    for image in range(2):
        logits, boxes = plain_predictions(head, levels, image)
        best = logits.amax(1).argsort(descending=True)[:7]
        assert torch.allclose(selected[image].sigmoid(), boxes[best], atol=1e-5)
    if training:
        assert predictions.logits.shape == (1, 2, 30, 4) and predictions.boxes.requires_grad
        padded = torch.cat([level.padding_mask.flatten(1) for level in levels], dim=1)
        assert (predictions.logits[0][padded].sigmoid() == 0).all()
    else:
        assert predictions is None


def test_fewer_pixels_than_queries():
    """The remaining queries look at the whole image and have no contents, in a padded batch just as alone."""
    head = make_head(EncoderSelection, with_content=True).eval()
    levels = make_levels(sizes=((3, 3),), valid=[(1, 2)])
    together, content, _ = head.select(levels, num_queries=20)
    (level,) = levels
    cut = FeatureLevel(level.features[1:, :1, :2], level.position[:, :1, :2], level.valid_size[1:])
    alone, content_alone, _ = head.select([cut], num_queries=20)
    assert torch.allclose(content[1:], content_alone, atol=1e-5)
    assert (content[1, :2] != 0).all() and (content[1, 2:] == 0).all()
    assert torch.allclose(together[1:], alone, atol=1e-5)
    assert torch.allclose(together[0, 9:].sigmoid(), torch.tensor([0.5, 0.5, 1.0, 1.0]), atol=2e-3)
    assert torch.allclose(together[1, 2:].sigmoid(), torch.tensor([0.5, 0.5, 1.0, 1.0]), atol=2e-3)
    assert (together[0, :9].sigmoid()[:, 2:] < 0.9).all()


@pytest.mark.parametrize("training", [True, False])
def test_contents_are_those_of_the_selected_pixels_and_teach_the_encoder(training):
    head, levels = make_head(EncoderSelection, with_content=True).train(training), make_levels()
    for level in levels:
        level.features.requires_grad_()
    _, content, _ = head.select(levels, num_queries=6)
    for image in range(2):
        logits, _ = plain_predictions(head, levels, image)
        pixels = torch.cat([level.features[image].flatten(0, 1) for level in levels])
        best = logits.amax(1).argsort(descending=True)[:6]
        assert torch.allclose(content[image], head.content(head.norm(head.projection(pixels[best]))), atol=1e-5)
    content.sum().backward()
    assert sum((level.features.grad.abs().sum(-1) > 0).sum().item() for level in levels) == 12


def test_a_new_head_selects_anchors_and_every_class_starts_at_the_prior():
    head, levels = EncoderSelection(**OPTIONS), make_levels()
    boxes = head(levels).boxes[0]
    assert torch.allclose(boxes[:, :24, 2:], torch.tensor(0.2)) and torch.allclose(boxes[:, 24:, 2:], torch.tensor(0.4))
    assert torch.allclose(head.class_head.bias.sigmoid(), torch.tensor(0.01))


@pytest.mark.parametrize("with_content", [True, False])
def test_queries_start_from_the_selected_boxes(with_content):
    selection = make_head(EncoderSelection, with_content=with_content)
    generator = LearnedQueryGenerator(num_queries=5, dim=16, selection=selection)
    levels = make_levels()
    queries = generator(levels, [ImageTarget(torch.zeros(0).long(), torch.zeros(0, 4))] * 2)
    assert torch.equal(queries.reference_logits, selection.select(levels, 5)[0])
    content = selection.select(levels, 5)[1] if with_content else torch.zeros(2, 5, 16)
    assert torch.equal(queries.content, content)
    assert queries.proposals.boxes.shape == (1, 2, 30, 4)
    assert "reference_logits" not in generator.state_dict()
    assert generator.eval()(levels).proposals is None


def make_criterion(**options):
    weights = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
    return SetCriterion(matcher=make_matcher(), **weights, focal_alpha=0.25, focal_gamma=2.0, **options)


def test_each_box_teaches_the_pixels_that_fit_it_best():
    head, levels = make_head(DenseHead, pixels_per_box=3), make_levels()
    # Far from each other, so that no pixel belongs to both.
    target = ImageTarget(torch.tensor([1, 2]), torch.tensor([[0.1, 0.2, 0.2, 0.2], [0.9, 0.8, 0.2, 0.2]]))
    nothing = ImageTarget(torch.zeros(0).long(), torch.zeros(0, 4))
    losses = head.losses(levels, [target, nothing], make_criterion(), torch.tensor(2.0))
    expected = torch.zeros(3)
    for image in range(2):
        logits, boxes = plain_predictions(head, levels, image)
        pairs = {}
        if image == 0:
            cost = plain_cost(logits, boxes, target)
            pairs = {
                pixel: (target.labels[box].item(), target.boxes[box])
                for box in range(2)
                for pixel in cost[:, box].argsort()[:3].tolist()
            }
            assert len(pairs) == 6
        expected += plain_losses(logits, boxes, pairs)
    found = torch.stack([losses[f"loss_dense_{name}"] for name in ("class", "l1", "giou")])
    assert torch.allclose(found, expected / (2 * 3), rtol=1e-4)


def test_more_pixels_per_box_than_there_are():
    head, levels = make_head(DenseHead, pixels_per_box=100), make_levels(sizes=((2, 2),))
    target = ImageTarget(torch.tensor([1]), torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    losses = head.losses(levels, [target, target], make_criterion(), torch.tensor(2.0))
    assert all(math.isfinite(loss) for loss in losses.values())


def losses_without_number(head, levels, targets, criterion):
    """The losses of all pixels, matched one to one and one to many, before any is divided by a number of boxes or pixels."""
    one = torch.tensor(1.0)
    many = head.losses(levels, targets, criterion, one)
    number = min(head.pixels_per_box, sum(level.features[0, ..., 0].numel() for level in levels))
    return criterion.matching_losses(head(levels), targets, one) | {name: loss * number for name, loss in many.items()}


@pytest.mark.parametrize("iou_aware", [False, True])
def test_padded_pixels_learn_nothing(iou_aware):
    """The second image has five boxes, more than its four pixels: its losses are those that it has alone."""
    criterion = make_criterion(iou_aware=iou_aware)
    head, levels = make_head(DenseHead, pixels_per_box=6), make_levels(sizes=((4, 6),), valid=[(2, 2)])
    targets = [ImageTarget(torch.randint(4, (n,)), torch.rand(n, 4) * 0.3 + 0.3) for n in (3, 5)]
    together = losses_without_number(head, levels, targets, criterion)
    (level,) = levels
    first = FeatureLevel(level.features[:1], level.position, level.valid_size[:1])
    second = FeatureLevel(level.features[1:, :2, :2], level.position[:, :2, :2], level.valid_size[1:])
    alone = [
        losses_without_number(head, [part], [target], criterion)
        for part, target in zip((first, second), targets, strict=True)
    ]
    for name, loss in together.items():
        assert torch.isclose(loss, alone[0][name] + alone[1][name], rtol=1e-4), name


def test_boxes_that_share_a_pixel_may_come_in_any_order():
    """Scores that are aware of the IoU: of several targets for one pixel and class, the largest counts."""
    head, levels = make_head(DenseHead, pixels_per_box=10), make_levels()
    labels, boxes = torch.tensor([1, 1, 2]), torch.rand(3, 4) * 0.3 + 0.3
    criterion = make_criterion(iou_aware=True)

    def losses(order):
        targets = [ImageTarget(labels[order], boxes[order])] * 2
        return head.losses(levels, targets, criterion, torch.tensor(1.0))

    forward, backward = losses([0, 1, 2]), losses([2, 1, 0])
    assert all(torch.isclose(forward[name], backward[name], rtol=1e-5) for name in forward)
