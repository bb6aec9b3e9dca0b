"""samdetr.data: cleaning, augmentation, loaders, the embedded dataset."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_config, tiny_config
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from samdetr.data import (
    DetrDatasetMapper,
    build_test_loader,
    build_train_loader,
    clean_annotations,
    register_coco_format,
)
from samdetr.data.dataset_mapper import build_train_augmentation
from samdetr.data.digits import _SPLITS, write_digits
from samdetr.errors import UserError


def record_with(*boxes, mode=BoxMode.XYWH_ABS):
    annotations = [{"bbox": list(box), "bbox_mode": mode, "category_id": 0} for box in boxes]
    return {"file_name": "photo.jpg", "height": 40, "width": 60, "annotations": annotations}


def test_bad_boxes_are_dropped_or_clipped_with_a_count(caplog):
    record = record_with(
        *[(10, 10, 20, 20), (5, 5, 0, 10), (5, 5, 10, -3), (70, 5, 10, 10), (50, 30, 30, 30), (0, 0, float("nan"), 1)]
    )
    before = json.dumps(record["annotations"])
    with caplog.at_level(logging.WARNING, logger="samdetr.data.build"):
        (cleaned,) = clean_annotations([record])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in cleaned["annotations"]]
    assert boxes == [[10, 10, 30, 30], [50, 30, 60, 40]]
    assert json.dumps(record["annotations"]) == before
    messages = "\n".join(caplog.messages)
    assert "width or height not positive: 2, the first in photo.jpg" in messages
    assert "outside the image: 1" in messages and "not finite: 1" in messages and "clipped" in messages


def test_images_without_boxes_stay(caplog):
    with caplog.at_level(logging.WARNING):
        cleaned = clean_annotations([record_with(), record_with((5, 5, 0, 0))])
    assert [len(record["annotations"]) for record in cleaned] == [0, 0]


coordinates = st.floats(-200, 200, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5))
def test_whatever_is_left_lies_in_the_image_and_has_an_area(boxes):
    (cleaned,) = clean_annotations([record_with(*boxes)])
    for annotation in cleaned["annotations"]:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        assert x0 < x1 and y0 < y1
        assert x0 >= -1 and y0 >= -1 and x1 <= 61 and y1 <= 41  # a pixel's rounding is not worth a warning


def test_training_augmentation_of_the_coco_configs():
    flip, crop, resize = build_train_augmentation(load_config("sam_detr_R_50_1x"))
    assert isinstance(flip, T.RandomFlip) and flip.horizontal and flip.prob == 0.5
    assert isinstance(crop, T.RandomApply) and crop.prob == 0.5
    assert crop.aug.augs[0].short_edge_length == [400, 500, 600]
    assert crop.aug.augs[1].crop_size == [384, 600] and crop.aug.augs[1].crop_type == "absolute_range"
    assert list(resize.short_edge_length) == list(range(480, 801, 32)) and resize.max_size == 1333


def test_both_branches_happen_and_are_logged(tmp_path, caplog):
    cfg = load_config("sam_detr_R_50_1x", "INPUT.MIN_SIZE_TRAIN", (480,), "INPUT.RANDOM_FLIP", "none")
    with caplog.at_level(logging.INFO):
        mapper = DetrDatasetMapper(cfg, is_train=True)
    assert "RandomApply" in caplog.text and "RandomCrop" in caplog.text and "ResizeShortestEdge" in caplog.text
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((500, 1000, 3), np.uint8)).save(path)
    record = {"file_name": str(path), "height": 500, "width": 1000, "image_id": 1, "annotations": []}
    shapes = [tuple(mapper(record)["image"].shape[1:]) for _ in range(40)]
    whole = [shape for shape in shapes if shape == (480, 960)]
    assert 8 <= len(whole) <= 32  # half of forty
    assert all(min(shape) == 480 for shape in shapes)


def test_crops_move_and_clip_the_boxes(tmp_path):
    """Wherever the crop falls, the box still covers the white square."""
    cfg = load_config("sam_detr_R_50_1x", "INPUT.DETR_CROP.PROB", 1.0, "INPUT.MIN_SIZE_TRAIN", (480,))
    mapper = DetrDatasetMapper(cfg, is_train=True)
    pixels = np.zeros((500, 700, 3), np.uint8)
    pixels[150:350, 250:500] = 255
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    annotation = {"bbox": [250, 150, 250, 200], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    record = {"file_name": str(path), "height": 500, "width": 700, "image_id": 1, "annotations": [annotation]}
    for _ in range(10):
        mapped = mapper(record)
        instances = mapped["instances"]
        assert instances.gt_classes.tolist() == [3]
        rows, columns = np.nonzero(mapped["image"][0].numpy() > 127)
        white = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (instances.gt_boxes.tensor[0] - white).abs().max() <= 2


def test_detectron2s_own_crop_is_refused():
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.ENABLED has no effect.*INPUT\.DETR_CROP"):
        DetrDatasetMapper(tiny_config("INPUT.CROP.ENABLED", True), is_train=True)


def test_loaders_keep_images_without_boxes(shapes_dataset):
    cfg = tiny_config(
        *("DATASETS.TRAIN", (shapes_dataset,), "SOLVER.IMS_PER_BATCH", 6, "DATALOADER.NUM_WORKERS", 0),
        *("DATALOADER.ASPECT_RATIO_GROUPING", False),
    )
    batch = next(iter(build_train_loader(cfg)))
    assert sorted(inputs["image_id"] for inputs in batch) == [1, 2, 3, 4, 5, 6]
    counts = {inputs["image_id"]: len(inputs["instances"]) for inputs in batch}
    assert counts == {1: 1, 2: 2, 3: 0, 4: 1, 5: 2, 6: 0}
    assert [len(inputs) for inputs in build_test_loader(cfg, shapes_dataset)] == [1] * 6


def coco_config(*entries):
    return tiny_config("DATASETS.COCO_FORMAT", list(entries))


def test_datasets_named_in_the_config(shapes_root):
    """Loaded with their class names, by name, as often as one likes."""
    entry = ["own_shapes", str(shapes_root / "annotations.json"), str(shapes_root)]
    for _ in range(2):
        register_coco_format(coco_config(entry))
    assert MetadataCatalog.get("own_shapes").thing_classes == ["green", "red"]
    assert len(DatasetCatalog.get("own_shapes")) == 6


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["a", "b"], r"has the entry \['a', 'b'\]: each is \[name, annotation file, image folder\]"),
        (["x1", "no.json", "."], r"x1's annotation file no\.json does not exist \(looked in"),
        (["x2", "ROOT/annotations.json", "no"], r"x2's image folder no does not exist"),
        (["digits_val", "ROOT/annotations.json", "ROOT"], r"the name 'digits_val' belongs to .*choose another"),
        (["x3", "ROOT/1.png", "ROOT"], r"1\.png is not COCO's format"),
    ],
)
def test_mistakes_in_datasets_of_the_config(entry, message, shapes_root):
    with pytest.raises(UserError, match=message):
        register_coco_format(coco_config([part.replace("ROOT", str(shapes_root)) for part in entry]))


def test_records_without_a_size_are_left_to_the_mapper():
    record = record_with((10, 10, 500, 20))
    del record["height"], record["width"]
    (cleaned,) = clean_annotations([record])
    assert cleaned["annotations"][0]["bbox"] == [10, 10, 500, 20]


def test_embedded_dataset_is_well_formed_and_disjoint():
    train, val = DatasetCatalog.get("digits_train"), DatasetCatalog.get("digits_val")
    assert (len(train), len(val)) == (2000, 200)
    assert MetadataCatalog.get("digits_val").thing_classes == [str(digit) for digit in range(10)]
    for records in (train, val):
        counts = np.array([len(record["annotations"]) for record in records])
        assert counts.min() == 0 and counts.max() == 5
        labels = np.bincount([a["category_id"] for record in records for a in record["annotations"]], minlength=10)
        assert labels.min() > 0.06 * labels.sum()
        for record in records:
            for annotation in record["annotations"]:
                x, y, w, h = annotation["bbox"]
                assert x >= 0 and y >= 0 and w >= 4 and h >= 8 and x + w <= 128 and y + h <= 128
    assert _SPLITS["train"].scans.stop <= _SPLITS["val"].scans.start
    assert _SPLITS["train"].columns.stop <= _SPLITS["val"].columns.start
    image = Image.open(train[0]["file_name"])
    assert image.size == (128, 128) and image.mode == "RGB"


def test_embedded_dataset_is_the_same_every_time(tmp_path):
    write_digits(str(tmp_path))
    first = sorted(path for path in tmp_path.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    assert len(first) == 2000 + 200 + 2
    DatasetCatalog.get("digits_val")
    used = Path(MetadataCatalog.get("digits_val").json_file).parent.parent
    for name in ("val.json", "train.json", "val/000007.jpg"):
        (path,) = tmp_path.rglob(name)
        assert path.read_bytes() == (used / path.parent.name / path.name).read_bytes()
