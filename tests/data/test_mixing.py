"""samdetr.data.mixing: after mosaic and mixup, boxes are where the objects are. Every object has a colour of its own."""

import random

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from samdetr.data.mixing import Mixing, mixup, mosaic
from samdetr.data.sampling import seeded


def sample(label, height, width, boxes):
    """A black image with a rectangle of the brightness ``200 + label`` in each box."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for x0, y0, x1, y1 in boxes:
        image[:, y0:y1, x0:x1] = 200 + label
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.full((len(boxes),), label)
    return {"image": image, "instances": instances, "file_name": f"{label}.png"}


def random_sample(label, generator):
    height, width = generator.integers(60, 120, 2).tolist()
    x0, y0 = (int(generator.integers(0, side - 12)) for side in (width, height))
    x1, y1 = int(generator.integers(x0 + 8, width + 1)), int(generator.integers(y0 + 8, height + 1))
    return sample(label, height, width, [[x0, y0, x1, y1]])


def check_boxes(image, instances):
    """Each box is filled with its object, and objects are nowhere else; up to the pixels that resizing blurs."""
    outside = torch.ones(image.shape[1:], dtype=torch.bool)
    height, width = image.shape[1:]
    assert instances.image_size == (height, width)
    for box, label in zip(instances.gt_boxes.tensor, instances.gt_classes.tolist()):
        assert (box >= 0).all() and (box <= torch.tensor([width, height] * 2)).all() and (box[2:] > box[:2]).all()
        x0, y0 = (box[:2] + 3).floor().int().tolist()
        x1, y1 = (box[2:] - 3).ceil().int().tolist()
        inner = image[0, max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]
        assert (inner == 200 + label).all()
        x0, y0 = (box[:2] - 3).floor().clamp(min=0).int().tolist()
        x1, y1 = (box[2:] + 3).ceil().int().tolist()
        outside[y0:y1, x0:x1] = False
    assert (image[0][outside] < 128).all()


@pytest.mark.parametrize("seed", range(30))
def test_mosaic_moves_the_boxes_with_their_objects(seed):
    generator = np.random.default_rng(seed)
    samples = [random_sample(label, generator) for label in range(4)]
    with seeded(seed):
        mixed = mosaic(samples)
    assert mixed["image"].shape == samples[0]["image"].shape and mixed["image"].dtype == torch.uint8
    assert mixed["file_name"] == "0.png"
    check_boxes(mixed["image"], mixed["instances"])


def test_a_mosaic_shows_all_four_images():
    samples = [sample(label, 64, 64, [[0, 0, 64, 64]]) for label in range(4)]
    with seeded(0):
        mixed = mosaic(samples)
    assert mixed["instances"].gt_classes.tolist() == [0, 1, 2, 3]
    assert mixed["instances"].gt_boxes.area().sum() == 64 * 64  # they share it, and nothing is empty
    assert mixed["image"].min() == 200
    assert [mixed["image"][0, y, x] for y in (0, 63) for x in (0, 63)] == [200, 201, 202, 203]


@pytest.mark.parametrize("seed", range(30))
def test_mixup_keeps_the_boxes_of_both(seed):
    generator = np.random.default_rng(seed)
    first, second = random_sample(0, generator), random_sample(1, generator)
    height, width = first["image"].shape[1:]
    empty = sample(0, height, width, [])
    with seeded(seed):
        mixed = mixup(first, second)
    with seeded(seed):
        alone = mixup(empty, second)
    with seeded(seed):
        other_alone = mixup(first, sample(1, *second["image"].shape[1:], []))
    assert torch.equal(mixed["instances"].gt_boxes.tensor[:1], first["instances"].gt_boxes.tensor)
    assert torch.equal(mixed["instances"].gt_boxes.tensor[1:], alone["instances"].gt_boxes.tensor)
    assert mixed["instances"].gt_classes.tolist() == [0] + [1] * (len(mixed["instances"]) - 1)
    # The blended image is the sum of its parts, each of which has its box where its object is.
    total = alone["image"].int() + other_alone["image"].int()
    assert (mixed["image"].int() - total).abs().max() <= 1
    for part, label in ((alone, 1), (other_alone, 0)):
        share = part["image"].max() / (200 + label)
        assert not len(part["instances"]) or 0.39 < share < 0.61
        bright = (part["image"].float() / share.clamp(min=0.1)).round().clamp(0, 200 + label).to(torch.uint8)
        bright[bright >= 198 + label] = 200 + label
        check_boxes(bright, part["instances"])


def test_images_without_boxes_and_of_one_pixel():
    tiny = [sample(label, 1, 1, [[0, 0, 1, 1]]) for label in range(4)]
    empty = [sample(label, 30, 40, []) for label in range(4)]
    for samples in (tiny, empty, [tiny[0], *empty[1:]], [empty[0], *tiny[1:]]):
        with seeded(3):
            for mixed in (mosaic(samples), mixup(*samples[:2])):
                assert mixed["image"].shape == samples[0]["image"].shape
                assert mixed["instances"].gt_boxes.tensor.shape == (len(mixed["instances"].gt_classes), 4)


def test_samples_are_mixed_as_often_as_asked():
    samples = [sample(label, 32, 32, [[0, 0, 32, 32]]) for label in range(5)]
    mixing = Mixing(mosaic_prob=0.5, mixup_prob=0.25)
    assert mixing.most_images == 5
    with seeded(0):
        numbers = [len(mixing(samples[0], lambda: samples[random.randrange(1, 5)])["instances"]) for _ in range(800)]
    share = {number: numbers.count(number) / 800 for number in (1, 2, 4, 5)}
    assert sum(numbers.count(number) for number in share) == 800
    for number, expected in ((1, 0.375), (2, 0.125), (4, 0.375), (5, 0.125)):
        assert abs(share[number] - expected) < 0.06
    assert Mixing(mosaic_prob=0, mixup_prob=0).most_images == 1
