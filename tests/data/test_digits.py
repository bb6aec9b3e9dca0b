"""samdetr.data.digits: the embedded dataset."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from samdetr.data.digits import _SPLITS, write_digits


def test_embedded_dataset_is_well_formed_and_disjoint():
    train, val = DatasetCatalog.get("digits_train"), DatasetCatalog.get("digits_val")
    assert (len(train), len(val)) == (2000, 200) and DatasetCatalog.get("digits_val_20") == val[:20]
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


def test_embedded_dataset_is_the_same_every_time(tmp_path, monkeypatch):
    """The first images of each split, which do not depend on how many follow."""
    for name, split in _SPLITS.items():
        monkeypatch.setitem(_SPLITS, name, dataclasses.replace(split, num_images=30))
    write_digits(str(tmp_path))
    assert len(list(tmp_path.rglob("*.jpg"))) == 30 + 30
    DatasetCatalog.get("digits_val")
    used = Path(MetadataCatalog.get("digits_val").json_file).parent.parent
    for split in ("train", "val"):
        (path,) = tmp_path.rglob(f"{split}.json")
        here, there = (json.loads(file.read_text()) for file in (path, used / "annotations" / f"{split}.json"))
        assert here["images"] == there["images"][:30] and here["categories"] == there["categories"]
        assert here["annotations"] == [entry for entry in there["annotations"] if entry["image_id"] <= 30]
        for image in tmp_path.rglob(f"{split}/*.jpg"):
            assert image.read_bytes() == (used / split / image.name).read_bytes()
