"""samdetr.data.voc_format: what is read, repaired and refused; and that training and evaluation read the same."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers import tiny_config
from samdetr.data import load_records, read_voc, register_datasets
from samdetr.errors import UserError


def annotation(*objects, size=(60, 40), filename="photo.jpg"):
    """An XML file; each object is (name, xmin, ymin, xmax, ymax, difficult)."""
    found = "".join(
        f"<object><name>{name}</name><part><name>head</name></part><difficult>{difficult}</difficult><bndbox>"
        f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
        for name, x0, y0, x1, y1, difficult in objects
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><filename>{filename}</filename>{sides}{found}</annotation>"


@pytest.fixture
def folder(tmp_path):
    """Two images in train, one in val; the class "cat" is only in val."""
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (tmp_path / part).mkdir(parents=True)
    files = {
        "a": annotation(("dog", 1, 1, 60, 40, 0), ("bird", 11, 6, 20, 15, 1)),
        "b": annotation(size=None),
        "c": annotation(("cat", 5, 5, 9, 9, 0)),
    }
    for name, text in files.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a  1\nb -1\n\n")
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("c\n")
    return tmp_path


def test_boxes_classes_and_sizes(folder):
    train, val = read_voc(folder, "train"), read_voc(folder, "val")
    assert train.class_names == val.class_names == ["bird", "cat", "dog"]
    assert train.image_ids == ["a", "b"] and train.file_names == ["a.jpg", "b.jpg"]
    # Pixels are counted from 1, the last one included; what is difficult is not counted.
    assert train.boxes.tolist() == [[0, 0, 60, 40], [10, 5, 10, 10]]
    assert train.class_index.tolist() == [2, 0] and train.crowd.tolist() == [False, True]
    assert train.sizes.tolist() == [[60, 40]] * 2  # one of them read from the image
    assert train.report.counts == {"images without a width and height in the annotation file": 1}
    assert val.boxes.tolist() == [[4, 4, 5, 5]]


def test_a_folder_that_counts_from_zero(folder):
    (folder / "Annotations" / "b.xml").write_text(annotation(("dog", 0, 3, 30, 20, 0)))
    assert read_voc(folder, "train").boxes.tolist()[-1] == [0, 3, 30, 17]
    assert read_voc(folder, "val").boxes.tolist() == [[5, 5, 4, 4]]


@pytest.mark.parametrize("least", ["0.00", "0.4"])
def test_a_coordinate_below_one_counts_from_zero_however_it_is_written(folder, least):
    (folder / "Annotations" / "b.xml").write_text(annotation(("dog", least, 3, 30, 20, 0)))
    assert read_voc(folder, "train").boxes.tolist()[-1] == [float(least), 3, 30 - float(least), 17]


def test_an_image_that_is_listed_twice_is_there_once(folder):
    (folder / "ImageSets" / "Main" / "val.txt").write_text("c\nc\n")
    found = read_voc(folder, "val")
    assert found.image_ids == ["c"] and len(found.boxes) == 1
    assert found.report.counts == {"image entries that stand twice": 1} and not found.report.errors


@pytest.mark.parametrize("name", ["my photo", "1", "a[1]"])
def test_names_with_blanks_dots_and_brackets(folder, name):
    """Without <filename> in the XML file, and beside images of similar names."""
    for image in (name, "1.5", "a1", "my"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / "JPEGImages" / f"{image}.png")
    (folder / "Annotations" / f"{name}.xml").write_text(annotation(("dog", 1, 1, 60, 40, 0), filename=""))
    for line in (name, f"{name}  -1"):
        (folder / "ImageSets" / "Main" / "val.txt").write_text(f"{line}\n")
        found = read_voc(folder, "val")
        assert found.file_names == [f"{name}.png"] and not found.report.errors


def test_images_that_were_missing_are_found_later(folder):
    image = folder / "JPEGImages" / "c.jpg"
    content = image.read_bytes()
    image.unlink()
    assert read_voc(folder, "val").report.errors == ["images missing"]
    assert read_voc(folder, "val").report.errors == ["images missing"]
    image.write_bytes(content)
    assert not read_voc(folder, "val").report.errors


def test_files_that_change_are_read_again(folder):
    assert len(read_voc(folder, "val").boxes) == 1
    (folder / "Annotations" / "c.xml").write_text(annotation())
    assert len(read_voc(folder, "val").boxes) == 0


@pytest.mark.parametrize(
    ("file", "text", "kind", "example"),
    [
        ("Annotations/a.xml", "<annotation><object>", "annotation files that are damaged", "a.xml"),
        ("Annotations/a.xml", "", "annotation files that are damaged", "a.xml"),
        ("Annotations/a.xml", annotation(("dog", 1, 1, "many", 4, 0)), "annotations without a usable box", "many"),
        ("Annotations/a.xml", annotation(("", 1, 1, 5, 4, 0)), "annotations of an unknown category", "None"),
        ("ImageSets/Main/train.txt", "a\nnowhere\n", "images without an annotation file", "nowhere.xml"),
        ("ImageSets/Main/train.txt", "", "datasets without images", "is empty"),
    ],
)
def test_what_is_refused(folder, file, text, kind, example):
    (folder / file).write_text(text)
    report = read_voc(folder, "train").report
    assert kind in report.errors and example in str(report.examples[kind])
    cfg = tiny_config("DATASETS.VOC_FORMAT", [["broken", str(folder), "train"]])
    with pytest.raises(UserError, match=rf"DATASETS\.VOC_FORMAT: .*train\.txt has .*{kind}"):
        register_datasets(cfg)


def test_a_link_that_leads_nowhere_is_named(folder):
    (folder / "Annotations" / "d.xml").symlink_to(folder / "nowhere.xml")
    assert not read_voc(folder, "train").report.errors  # it is of no image there
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nd\n")
    report = read_voc(folder, "train").report
    assert "d.xml" in str(report.examples) and report.errors


def test_places_that_are_missing(folder):
    with pytest.raises(UserError, match=r"no split 'trian'.*It has \['train', 'val'\]"):
        read_voc(folder, "trian")
    with pytest.raises(UserError, match="no folder Annotations"):
        read_voc(folder / "JPEGImages", "train")
    with pytest.raises(UserError, match=r"other's folder nowhere does not exist"):
        register_datasets(tiny_config("DATASETS.VOC_FORMAT", [["other", "nowhere", "train"]]))
    with pytest.raises(UserError, match=r"has the entry \['other', 'nowhere'\]: each is \[name, folder, split\]"):
        register_datasets(tiny_config("DATASETS.VOC_FORMAT", [["other", "nowhere"]]))


def test_a_registered_dataset_is_found_below_the_datasets_folder(folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.parent))
    monkeypatch.chdir("/")
    cfg = tiny_config("DATASETS.VOC_FORMAT", [["voc_mine", folder.name, "train"]])
    try:
        register_datasets(cfg)
        register_datasets(cfg)
        assert MetadataCatalog.get("voc_mine").thing_classes == ["bird", "cat", "dog"]
        records = load_records("voc_mine", ["dog", "cat", "bird"])  # a model's order
        assert [entry["category_id"] for entry in records[0]["annotations"]] == [0, 2]
        assert records[0]["file_name"] == str(folder / "JPEGImages" / "a.jpg")
    finally:
        DatasetCatalog.remove("voc_mine")
        MetadataCatalog.remove("voc_mine")
