"""samdetr.data.dataset_mapper: pictures and boxes through DETR's augmentation."""

import logging

import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image

from helpers import load_config, tiny_config
from samdetr.data import DetrDatasetMapper


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
