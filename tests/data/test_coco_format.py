"""samdetr.data.coco_format: datasets named in a config."""

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from helpers import tiny_config
from samdetr.data import (
    register_coco_format,
)
from samdetr.errors import UserError


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
        (["x3", "ROOT/1.png", "ROOT"], r"1\.png is not a text in UTF-8 \(byte 0x89"),
    ],
)
def test_mistakes_in_datasets_of_the_config(entry, message, shapes_root):
    with pytest.raises(UserError, match=message):
        register_coco_format(coco_config([part.replace("ROOT", str(shapes_root)) for part in entry]))
