"""samdetr.data.yolo_format: what is read, repaired and refused."""

import os

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers import tiny_config
from samdetr.data import load_records, read_yolo, register_datasets
from samdetr.errors import UserError

DESCRIPTION = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"]}


@pytest.fixture
def dataset(tmp_path):
    """Three images in train, one of them in a folder below and one without labels; one image in val."""
    labels = {
        "train/a": "1 0.5 0.5 1 1\n0 0.25 0.25 0.5 0.5\n",
        "train/below/b": "0 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9\n",
        "train/c": None,
        "val/d": "\n",
    }
    for name, text in labels.items():
        image, label = (
            tmp_path / kind / f"{name}{suffix}" for kind, suffix in (("images", ".png"), ("labels", ".txt"))
        )
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(image)
        if text is not None:
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text)
    return describe(tmp_path)


def describe(folder, **changes):
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({**DESCRIPTION, **changes}))
    return path


def test_folders_behind_links_are_read_and_a_loop_of_them_once(dataset, tmp_path):
    (tmp_path / "images" / "train" / "below").rename(tmp_path / "store")
    (tmp_path / "images" / "train" / "below").symlink_to(tmp_path / "store")
    (tmp_path / "images" / "train" / "loop").symlink_to(tmp_path / "images" / "train")
    assert read_yolo(dataset, "train").file_names == [f"images/train/{name}.png" for name in ("a", "below/b", "c")]


def test_a_folder_that_cannot_be_read_is_not_left_out(dataset, tmp_path, monkeypatch):
    scandir = os.scandir

    def refused(path):
        if os.path.basename(path) == "below":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(UserError, match=r"below cannot be read \(Permission denied\)"):
        read_yolo(dataset, "train")


def test_a_path_to_above_a_link_is_above_what_it_points_to(dataset, tmp_path):
    described = describe(tmp_path, path="..")
    (tmp_path / "described").mkdir()
    described.rename(tmp_path / "described" / "data.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "described")
    train = read_yolo(tmp_path / "elsewhere" / "link" / "data.yaml", "train")
    assert not train.report.errors
    assert train.file_names == ["images/train/a.png", "images/train/below/b.png", "images/train/c.png"]


def test_boxes_polygons_and_images_without_labels(dataset):
    train = read_yolo(dataset, "train")
    assert train.file_names == ["images/train/a.png", "images/train/below/b.png", "images/train/c.png"]
    assert np.allclose(train.boxes, [[0, 0, 60, 40], [0, 0, 30, 20], [6, 4, 24, 32]])
    assert train.class_index.tolist() == [1, 0, 0] and train.class_names == ["cat", "dog"]
    assert train.report.counts == {"images without a label file": 1, "polygons": 1} and not train.report.errors
    assert len(read_yolo(dataset, "val").boxes) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"names": {0: "cat", 1: "dog"}, "nc": 2},
        {"path": "."},
        {"train": ["images/train"]},
        {"train": "../images/train"},
        {"train": "list.txt"},
    ],
)
def test_other_ways_to_say_the_same(dataset, changes):
    (dataset.parent / "list.txt").write_text("./images/train/a.png\nimages/train/below/b.png\nimages/train/c.png\n")
    expected = read_yolo(dataset, "train")
    found = read_yolo(describe(dataset.parent, **changes), "train")
    assert found.file_names == expected.file_names and np.array_equal(found.boxes, expected.boxes)


def test_keypoints_after_the_box_are_left_out(dataset):
    label = dataset.parent / "labels" / "train" / "a.txt"
    label.write_text("0 0.5 0.5 0.2 0.2 0.45 0.45 0.55 0.55\n1 0.5 0.5 1 1\n")
    (dataset.parent / "one.txt").write_text("./images/train/a.png\n")
    found = read_yolo(describe(dataset.parent, kpt_shape=[2, 2], train="one.txt"), "train")
    assert np.allclose(found.boxes, [[24, 16, 12, 8], [0, 0, 60, 40]]) and not found.report.counts
    label.write_text("0 0.5 0.5 0.2 0.2 0.45 0.45\n")
    assert read_yolo(dataset, "train").report.errors == ["labels that are no box"]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.5", "labels that are no box"),
        ("zero 0.5 0.5 0.5 0.5", "labels that are no box"),
        ("2 0.5 0.5 0.5 0.5", "labels of an unknown class"),
        ("0.5 0.5 0.5 0.5 0.5", "labels of an unknown class"),
        ("0 30 20 10 10", r"labels outside of \[0, 1\]"),
        ("0 nan 0.5 0.5 0.5", r"labels outside of \[0, 1\]"),
    ],
)
def test_lines_that_are_refused(dataset, line, kind):
    (dataset.parent / "labels" / "train" / "a.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(UserError, match=rf"YOLO_FORMAT: .*data\.yaml has {kind}: 1 \(.*a\.txt, line 2"):
        register_datasets(tiny_config("DATASETS.YOLO_FORMAT", [["broken", str(dataset), "train"]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": []}, r'"names" is \[\]'),
        ({"names": {"cat": 0}}, '"names" is'),
        ({"names": [True, False], "nc": 2}, 'reads a name in "names" as True: write the names in quotes'),
        ({"nc": 3}, '"nc" is 3, but there are 2 "names"'),
        ({"train": "nowhere"}, "'train' is 'nowhere', but .*nowhere is neither"),
        ({"train": "images/train/a.png"}, r"'train' is 'images/train/a\.png', which cannot be read as a list"),
        ({"kpt_shape": 17}, r'"kpt_shape" is 17: it must be \[number'),
        ({"train": None}, r"has no split 'train', only \['val'\]"),
    ],
)
def test_descriptions_that_are_refused(dataset, changes, message):
    with pytest.raises(UserError, match=message):
        read_yolo(describe(dataset.parent, **changes), "train")


def test_files_that_are_no_description(tmp_path):
    (tmp_path / "data.yaml").write_text("just words")
    with pytest.raises(UserError, match='it needs "names"'):
        read_yolo(tmp_path / "data.yaml", "train")
    with pytest.raises(UserError, match="cannot be read"):
        read_yolo(tmp_path / "nowhere.yaml", "train")


def test_damaged_images_and_labels_are_named(dataset):
    (dataset.parent / "images" / "train" / "a.png").write_bytes(b"no image")
    (dataset.parent / "labels" / "train" / "below" / "b.txt").write_bytes(b"\xff\xfe\x00")
    report = read_yolo(dataset, "train").report
    assert report.errors == ["annotation files that are damaged", "images without a width and height"]


def test_splits_of_one_file_are_datasets_of_their_own(dataset):
    entries = [["yolo_train", str(dataset), "train"], ["yolo_val", str(dataset), "val"]]
    cfg = tiny_config("DATASETS.YOLO_FORMAT", entries)
    try:
        register_datasets(cfg)
        register_datasets(cfg)
        assert [len(load_records(name)) for name in ("yolo_train", "yolo_val")] == [3, 1]
        with pytest.raises(UserError, match="the name 'yolo_val' belongs to"):
            register_datasets(tiny_config("DATASETS.YOLO_FORMAT", [["yolo_val", str(dataset), "train"]]))
    finally:
        for name in ("yolo_train", "yolo_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
