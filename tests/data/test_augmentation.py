"""samdetr.data.augmentation: what is applied to one image."""

import logging

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from helpers import load_config, tiny_config
from samdetr.checks import check_config
from samdetr.data import DetrDatasetMapper, build_train_loader
from samdetr.data.augmentation import LargeScaleJitter, build_train_augmentation
from samdetr.data.sampling import seeded
from samdetr.errors import UserError

ALL = (
    *("INPUT.PHOTOMETRIC.PROB", 0.5, "INPUT.LARGE_SCALE_JITTER.ENABLED", True),
    *("INPUT.MOSAIC.PROB", 0.5, "INPUT.MIXUP.PROB", 0.5),
)


def test_training_augmentation_of_the_coco_configs():
    flip, crop, resize = build_train_augmentation(load_config("sam_detr_R_50_1x"))
    assert isinstance(flip, T.RandomFlip) and flip.horizontal and flip.prob == 0.5
    assert isinstance(crop, T.RandomApply) and crop.prob == 0.5
    assert crop.aug.augs[0].short_edge_length == [400, 500, 600]
    assert crop.aug.augs[1].crop_size == [384, 600] and crop.aug.augs[1].crop_type == "absolute_range"
    assert list(resize.short_edge_length) == list(range(480, 801, 32)) and resize.max_size == 1333


def image_with_square(tmp_path, **record):
    pixels = np.zeros((150, 210, 3), np.uint8)
    pixels[45:105, 75:150] = (250, 120, 10)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    annotation = {"bbox": [75, 45, 75, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    return {"file_name": str(path), "height": 150, "width": 210, "image_id": 1, "annotations": [annotation], **record}


def test_jitter_resizes_and_crops_the_box_with_the_image(tmp_path):
    cfg = tiny_config(
        "INPUT.LARGE_SCALE_JITTER.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (100,), "INPUT.MAX_SIZE_TRAIN", 200
    )
    mapper = DetrDatasetMapper(cfg, is_train=True)
    record = image_with_square(tmp_path)
    widths = []
    for seed in range(40):
        with seeded(seed):
            mapped = mapper(record)
        height, width = mapped["image"].shape[1:]
        widths.append(width)
        assert height <= 100 and width <= 140  # never larger than usual: 100 x 140
        rows, columns = np.nonzero(mapped["image"][0].numpy() > 125)
        assert len(mapped["instances"]) == (1 if len(rows) else 0)
        if len(rows):
            seen = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (mapped["instances"].gt_boxes.tensor[0] - seen).abs().max() <= 2
    assert min(widths) < 90 and widths.count(140) > 20  # half the size at least; two of three multiples are above 1


def test_jitter_draws_its_multiple_evenly():
    jitter = LargeScaleJitter(T.Resize((50, 60)), (0.5, 2.0))
    with seeded(0):
        resized = [jitter.get_transform(np.zeros((80, 80, 3), np.uint8)).transforms[0] for _ in range(300)]
    multiples = np.array([transform.new_w / 60 for transform in resized])
    assert 0.49 < multiples.min() < 0.55 and 1.95 < multiples.max() <= 2 and abs(multiples.mean() - 1.25) < 0.06


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_photometric_change_leaves_boxes_where_they_are(tmp_path, image_format):
    options = ("INPUT.MIN_SIZE_TRAIN", (150,), "INPUT.MAX_SIZE_TRAIN", 300, "INPUT.FORMAT", image_format)
    plain = DetrDatasetMapper(tiny_config(*options), is_train=True)(image_with_square(tmp_path))
    cfg = tiny_config(*options, "INPUT.PHOTOMETRIC.PROB", 0.5)
    mapper = DetrDatasetMapper(cfg, is_train=True)
    changed = 0
    for seed in range(40):
        with seeded(seed):
            mapped = mapper(image_with_square(tmp_path))
        assert torch.equal(mapped["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
        assert mapped["image"].dtype == torch.uint8 and mapped["image"].shape == plain["image"].shape
        changed += not torch.equal(mapped["image"], plain["image"])
        red, _, blue = mapped["image"][:, 75, 110].tolist()[:: 1 if image_format == "RGB" else -1]
        assert red > 100 > blue  # the colours stay what they are
    assert 10 <= changed <= 30


def loader(*options):
    common = ["DATASETS.TRAIN", ("digits_val_20",), "INPUT.RANDOM_FLIP", "horizontal", "SOLVER.MAX_ITER", 6]
    return build_train_loader(tiny_config(*common, *options))


def batches(source, number, start=0):
    source.start = start
    result = []
    for batch in source:
        result.append([(entry["image"], entry["instances"].gt_boxes.tensor) for entry in batch])
        if len(result) == number:
            return result


def assert_same(first, second):
    for left, right in zip(first, second, strict=True):
        for (image, boxes), (other_image, other_boxes) in zip(left, right, strict=True):
            assert torch.equal(image, other_image) and torch.equal(boxes, other_boxes)


def test_all_of_it_together_goes_on_where_it_was_stopped_with_any_number_of_workers():
    whole = batches(loader(*ALL), 4)
    assert_same(batches(loader(*ALL), 4), whole)
    assert_same(batches(loader(*ALL, "DATALOADER.NUM_WORKERS", 2), 2, start=2), whole[2:])


def test_augmentation_ends_before_the_last_iterations(caplog):
    with caplog.at_level(logging.INFO):
        strong = loader(*ALL, "INPUT.AUGMENTATION_OFF_ITERS", 2)
    assert "Training images are mixed: Mixing(mosaic_prob=0.5, mixup_prob=0.5)" in caplog.text
    assert "From iteration 4 on" in caplog.text and "LargeScaleJitter" in caplog.text
    found, expected = batches(strong, 6), batches(loader(), 6)
    assert_same(found[4:], expected[4:])
    assert_same(batches(loader(*ALL, "INPUT.AUGMENTATION_OFF_ITERS", 2), 2, start=4), expected[4:])
    assert_same(found[:4], batches(loader(*ALL), 4))
    differ = [
        a.shape != b.shape or not torch.equal(a, b)
        for left, right in zip(found[:4], expected)
        for (a, _), (b, _) in zip(left, right)
    ]
    assert all(differ)


def test_more_boxes_than_queries_are_named(caplog):
    build_train_loader(
        tiny_config("DATASETS.TRAIN", ("digits_val_20",), "INPUT.MOSAIC.PROB", 0.5, "MODEL.SAMDETR.NUM_QUERIES", 6)
    )
    most = 5 + 5 + 5 + 4  # digits in the four images with the most
    assert f"Mixed images have up to {most} boxes, more than MODEL.SAMDETR.NUM_QUERIES (6)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("INPUT.MOSAIC.PROB", 1.5), r"INPUT\.MOSAIC\.PROB is 1\.5: it must be at least 0 and at most 1"),
        (("INPUT.PHOTOMETRIC.STRENGTH", -0.1), r"INPUT\.PHOTOMETRIC\.STRENGTH is -0\.1"),
        (
            ("INPUT.LARGE_SCALE_JITTER.SCALE", (2.0, 0.5)),
            r"SCALE is \(2\.0, 0\.5\): it must be the smallest and the largest",
        ),
        (("INPUT.LARGE_SCALE_JITTER.SCALE", ()), r"SCALE is \(\): it must be the smallest and the largest"),
        (("INPUT.LARGE_SCALE_JITTER.SCALE", (0.0, 1.0)), r"SCALE is \(0\.0, 1\.0\): it must be at least 0\.01"),
        (
            ("INPUT.AUGMENTATION_OFF_ITERS", 7, "SOLVER.MAX_ITER", 6),
            r"OFF_ITERS is 7, more than SOLVER\.MAX_ITER \(6\)",
        ),
    ],
)
def test_values_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        check_config(tiny_config(*options), training=True)
