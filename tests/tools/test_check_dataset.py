"""tools/check_dataset.py: what is wrong with a dataset is said."""

import json

import pytest
from PIL import Image

from processes import run_tool


def dataset_of(tmp_path, images=(), annotations=(), categories=({"id": 1, "name": "one"},)):
    for image in images:
        path = tmp_path / image["file_name"]
        if not path.exists():
            Image.new("RGB", (40, 30), (200, 30, 30)).save(path)
    data = {"images": list(images), "annotations": list(annotations), "categories": list(categories)}
    (tmp_path / "data.json").write_text(json.dumps(data))
    return tmp_path / "data.json"


def image_entry(image_id, **other):
    return {"id": image_id, "file_name": f"{image_id}.png", "width": 40, "height": 30, **other}


def box_entry(entry_id, box, image_id=1, category_id=1):
    entry = {"id": entry_id, "image_id": image_id, "category_id": category_id, "bbox": box}
    return {**entry, "area": 25, "iscrowd": 0}


GOOD = box_entry(7, [1, 1, 5, 5])


def test_a_good_dataset_passes(shapes_root):
    result = run_tool("check_dataset.py", shapes_root / "annotations.json", shapes_root)
    assert result.returncode == 0, result.stdout
    assert "6 images, 6 boxes, 2 classes" in result.stdout and "Set MODEL.SAMDETR.NUM_CLASSES 2." in result.stdout
    assert "warning: images without boxes: 2 (3.png, 6.png)" in result.stdout and "ERROR" not in result.stdout


@pytest.mark.parametrize(
    ("change", "fatal", "message"),
    [
        ({"annotations": [box_entry(1, [1, 1, 5, 5], category_id=7)]}, True, "annotations of an unknown category: 1"),
        ({"annotations": [box_entry(1, [1, 1, 5])]}, True, "annotations without a usable box: 1"),
        ({"annotations": [box_entry(1, [1, 1, 0, 5]), GOOD]}, False, "boxes of width or height zero or less: 1 (1.png"),
        ({"annotations": [box_entry(1, [50, 1, 5, 5]), GOOD]}, False, "boxes outside their image: 1"),
        ({"annotations": [box_entry(1, [20, 10, 38, 29])]}, False, "boxes look like corners"),
        ({"annotations": [box_entry(1, [0.1, 0.1, 0.5, 0.5])]}, False, "boxes look normalised"),
        ({"annotations": [box_entry(1, [1, 1, 5, 5], image_id=9), GOOD]}, False, "annotations of an unknown image: 1"),
        ({"annotations": [box_entry(1, [1, None, "5", 5])]}, True, "annotations without a usable box: 1"),
        ({"annotations": []}, True, "datasets without boxes"),
        ({"annotations": [box_entry(1, [1, 1, 0, 5])]}, True, "datasets without boxes"),
        ({"images": []}, True, "datasets without images"),
        ({"categories": [{"id": 1}]}, True, "categories without a name: 1 (1)"),
        ({"images": [image_entry(1), image_entry(1, width=41)]}, True, "image ids duplicated: 1 (1)"),
        ({"images": [image_entry(1, width=50)]}, True, "another size than the annotation file says: 1"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, True, "category ids duplicated: 1"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}, False, "classes without a box: 1 (b)"),
        ({"annotations": [GOOD] * 101}, False, "images with more than 100 boxes"),
        (
            {"annotations": [GOOD, {**GOOD, "id": 8}]},
            False,
            "boxes that stand twice in their image: 1 (1.png: [1.0, 1.0, 5",
        ),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(change, fatal, message, tmp_path):
    from samdetr.cli.check import check_dataset
    from samdetr.data import read_coco

    content = {"images": [image_entry(1)], "annotations": [GOOD], **change}
    report = check_dataset(read_coco(dataset_of(tmp_path, **content), tmp_path))
    assert any(message in line and line.startswith("ERROR" if fatal else "warning") for line in report.lines())
    assert bool(report.errors) == fatal, report.lines()


def test_damaged_images_are_named_and_end_with_an_error(tmp_path):
    json_file = dataset_of(tmp_path, [image_entry(i) for i in range(1, 4)], [box_entry(1, [1, 1, 5, 5])])
    (tmp_path / "1.png").unlink()
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_text("no image")
    result = run_tool("check_dataset.py", json_file, tmp_path)
    assert result.returncode == 1
    assert "ERROR: images missing: 1" in result.stdout and "1.png" in result.stdout
    assert "ERROR: images unreadable: 2" in result.stdout
    assert all(f"{name} is not an image that can be read" in result.stdout for name in ("2.png", "3.png"))
    assert run_tool("check_dataset.py", json_file, tmp_path, "--no-images").returncode == 0


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is not JSON"), ("{}", 'has no list "images"'), ("[1]", 'has no list "images"')]
)
def test_files_that_are_no_datasets(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content)
    result = run_tool("check_dataset.py", tmp_path / "data.json", tmp_path)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


def test_a_dataset_to_evaluate_on_may_be_without_boxes(tmp_path, tool):
    json_file = dataset_of(tmp_path, [image_entry(1)], [])
    assert tool("check_dataset", json_file, tmp_path)[0] == 1
    assert tool("check_dataset", json_file, tmp_path, "--eval-only")[0] == 0


def test_what_is_unusual_about_images_is_counted(tmp_path, tool):
    Image.new("RGBA", (40, 30)).save(tmp_path / "1.png")
    Image.new("I;16", (40, 30)).save(tmp_path / "2.png")
    json_file = dataset_of(tmp_path, [image_entry(1), image_entry(2)], [GOOD])
    status, printed = tool("check_dataset", json_file, tmp_path)
    assert status == 0
    assert "warning: images: transparency is ignored: 1" in printed
    assert "warning: images: 16 bits per pixel are scaled to 8: 1" in printed


def test_other_formats(tmp_path):
    for part in ("Annotations", "ImageSets/Main", "JPEGImages", "images/train", "labels/train"):
        (tmp_path / part).mkdir(parents=True)
    for place in ("JPEGImages", "images/train"):
        Image.new("RGB", (60, 40)).save(tmp_path / place / "a.png")
    box = "<xmin>11</xmin><ymin>6</ymin><xmax>20</xmax><ymax>15</ymax>"
    xml = f"<annotation><object><name>dog</name><bndbox>{box}</bndbox></object></annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(xml)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n0 2 2 2 2\n")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [dog]\n")
    result = run_tool("check_dataset.py", tmp_path, "--split", "train")
    assert result.returncode == 0 and "1 images, 1 boxes, 1 classes" in result.stdout
    result = run_tool("check_dataset.py", tmp_path / "data.yaml", "--split", "train")
    assert result.returncode == 1 and "ERROR: labels outside of [0, 1]: 1" in result.stdout
    for arguments in ([tmp_path], [tmp_path / "data.yaml"], [tmp_path / "data.yaml", tmp_path, "--split", "train"]):
        result = run_tool("check_dataset.py", *arguments)
        assert result.returncode == 1 and "Name a file in COCO's format and its image folder, or" in result.stderr
