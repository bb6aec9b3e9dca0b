"""samdetr.data.digits: the embedded dataset."""

from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from samdetr.data.digits import _SPLITS, write_digits


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
