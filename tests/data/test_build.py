"""samdetr.data.build: cleaned annotations, and loaders."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import tiny_config
from samdetr.data import (
    DetrDatasetMapper,
    build_test_loader,
    build_train_loader,
    clean_annotations,
    load_records,
    resolve_epochs,
)
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


@pytest.mark.parametrize(
    ("epochs", "batch", "iterations", "steps", "others"),
    [
        (10, 16, 1250, (1000, 1125), (25, 250, 125, 50, 0.992)),  # 2000 images
        (1, 4, 500, (400, 450), (10, 100, 50, 20, 0.98)),
        (1, 3, 667, (534, 600), (13, 133, 67, 27, 1 - 10 / 667)),
        (1, 700, 3, (2,), (1, 1, 1, 1, 0.0)),  # the second would be at the end
        (1, 2000, 1, (), (1, 1, 1, 1, 0.0)),
    ],
)
def test_epochs_become_iterations_of_which_all_else_keeps_its_share(epochs, batch, iterations, steps, others):
    cfg = tiny_config(
        *("SOLVER.EPOCHS", epochs, "SOLVER.IMS_PER_BATCH", batch, "SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", (800, 900)),
        *("SOLVER.WARMUP_ITERS", 20, "SOLVER.CHECKPOINT_PERIOD", 200, "TEST.EVAL_PERIOD", 100),
        *("INPUT.AUGMENTATION_OFF_ITERS", 40, "SOLVER.EMA.DECAY", 0.99),
    )
    cfg.freeze()
    resolved = resolve_epochs(cfg)
    assert iterations == resolved.SOLVER.MAX_ITER and steps == resolved.SOLVER.STEPS and resolved.is_frozen()
    solver = resolved.SOLVER
    found = (
        *(solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD, resolved.TEST.EVAL_PERIOD),
        *(resolved.INPUT.AUGMENTATION_OFF_ITERS, solver.EMA.DECAY),
    )
    assert found == pytest.approx(others, abs=1e-12)
    assert resolve_epochs(resolved).dump() == resolved.dump()
    assert cfg.SOLVER.MAX_ITER == 1000


def test_without_epochs_nothing_changes_and_no_evaluations_stay_none():
    cfg = tiny_config("SOLVER.MAX_ITER", 1000)
    assert resolve_epochs(cfg) is cfg
    cfg = tiny_config("SOLVER.EPOCHS", 1, "TEST.EVAL_PERIOD", 0, "INPUT.AUGMENTATION_OFF_ITERS", 0)
    resolved = resolve_epochs(cfg)
    assert resolved.TEST.EVAL_PERIOD == resolved.INPUT.AUGMENTATION_OFF_ITERS == 0


coordinates = st.floats(-200, 200, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(coordinates, coordinates, coordinates, coordinates), max_size=5))
def test_whatever_is_left_lies_in_the_image_and_has_an_area(boxes):
    (cleaned,) = clean_annotations([record_with(*boxes)])
    for annotation in cleaned["annotations"]:
        x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        assert x0 < x1 and y0 < y1
        assert x0 >= -1 and y0 >= -1 and x1 <= 61 and y1 <= 41  # a pixel's rounding is not worth a warning


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


def test_the_loader_is_entered_by_seed_and_start(shapes_dataset):
    cfg = tiny_config(
        *("DATASETS.TRAIN", (shapes_dataset,), "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 4),
        *("DATALOADER.ASPECT_RATIO_GROUPING", False),
    )
    whole = build_train_loader(cfg)
    batches = [[inputs["image_id"] for inputs in batch] for batch, _ in zip(whole, range(5))]
    cfg.SEED = 9
    entered = build_train_loader(cfg)
    entered.seed, entered.start = 4, 3
    assert [inputs["image_id"] for inputs in next(iter(entered))] == batches[3]
    assert (whole.seed, entered.seed, entered.dataset.seed) == (4, 4, 4)
    assert entered.epoch(6) == 2.0  # six batches of two of the six images
    cfg.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(UserError, match=r"SOLVER\.IMS_PER_BATCH \(0\) must be a positive multiple"):
        build_train_loader(cfg)


def test_records_without_a_size_are_left_to_the_mapper():
    record = record_with((10, 10, 500, 20))
    del record["height"], record["width"]
    (cleaned,) = clean_annotations([record])
    assert cleaned["annotations"][0]["bbox"] == [10, 10, 500, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file_name": None}, "record 0 is not a dict with a 'file_name'"),
        ({"image_id": ...}, "has no 'image_id'"),
        ({"annotations": {"bbox": [1, 2, 3, 4]}}, "is not a list of dicts"),
        ({"annotations": [{"bbox": [1, 2, 3], "bbox_mode": 0, "category_id": 0}]}, r"'bbox' of record 0 \(photo.jpg\)"),
        ({"annotations": [{"bbox": [1, 2, 3, 4], "category_id": 0}]}, "'bbox_mode' of record 0 .* is None"),
        ({"annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0, "category_id": "cat"}]}, "'category_id' .* is 'cat'"),
    ],
)
def test_records_that_a_function_made_wrongly_are_refused(change, message):
    record = {**record_with((1, 2, 3, 4)), "image_id": 1}
    DatasetCatalog.register("made_by_a_function", lambda: [record])
    try:
        assert load_records("made_by_a_function")[0]["file_name"] == "photo.jpg"
        record.update(change)
        record = {key: value for key, value in record.items() if value is not ...}
        with pytest.raises(UserError, match=f"'made_by_a_function'.*{message}"):
            load_records("made_by_a_function")
    finally:
        DatasetCatalog.remove("made_by_a_function")


def test_objects_of_a_class_that_the_model_lacks_are_refused(shapes_dataset):
    cfg = tiny_config("DATASETS.TRAIN", (shapes_dataset,), "MODEL.SAMDETR.NUM_CLASSES", 1)
    with pytest.raises(UserError, match=r"has objects of class 1, but MODEL\.SAMDETR\.NUM_CLASSES is 1: raise it"):
        build_train_loader(cfg)


def test_an_image_that_a_function_made_twice_is_refused_in_evaluation():
    """COCO's evaluation would look for the detections of both in one of them."""
    records = [{**record_with(box), "image_id": 7} for box in ((1, 2, 3, 4), (5, 6, 7, 8))]
    DatasetCatalog.register("made_by_a_function", lambda: records)
    try:
        with pytest.raises(
            UserError, match=r"record 1 \(photo\.jpg\) has the 'image_id' 7 of record 0: give each its own"
        ):
            load_records("made_by_a_function")
        assert len(load_records("made_by_a_function", training=True)) == 2
    finally:
        DatasetCatalog.remove("made_by_a_function")


def test_boxes_of_whole_numbers_keep_their_fractions_and_records_may_have_none(tmp_path):
    """detectron2 computes with integers, if all numbers of a box are integers."""
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / "photo.png")
    bare = {"file_name": str(tmp_path / "photo.png"), "height": 128, "width": 128, "image_id": 0}
    annotation = {"bbox": [31, 20, 41, 46], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    options = ["INPUT.MIN_SIZE_TRAIN", (100,), "INPUT.RANDOM_FLIP", "none", "INPUT.DETR_CROP.PROB", 0.0]
    mapper = DetrDatasetMapper(tiny_config(*options), is_train=True)
    with_box, without = (mapper(record) for record in clean_annotations([{**bare, "annotations": [annotation]}, bare]))
    expected = torch.tensor([[31.0, 20, 72, 66]]) * 100 / 128
    assert torch.allclose(with_box["instances"].gt_boxes.tensor, expected, atol=1e-4)
    assert len(without["instances"]) == 0
