"""Odd annotation files that people's tools write: each is read rightly, or refused in a line, by the check and by a run."""

import copy
import json
import logging
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers import tiny_config
from mutations import SHORT, make_dataset, try_run
from samdetr.data import load_records, read_coco, register_coco_format
from samdetr.engine.evaluation import build_evaluator
from samdetr.errors import UserError


def each(key, change):
    """A mutation of every entry of a list of the file."""

    def mutate(data):
        for entry in data[key]:
            change(entry)

    return mutate


def put(key, name, value):
    """Set one field of every entry; ``value`` may be a function of the entry."""
    return each(key, lambda entry: entry.update({name: value(entry) if callable(value) else value}))


def drop(key, name):
    return each(key, lambda entry: entry.pop(name))


def first(mutate):
    """Apply a mutation to the first annotation only."""

    def mutate_first(data):
        mutate({**data, "annotations": data["annotations"][:1]})

    return mutate_first


# Accepted: what the log says of it, if anything. All eight boxes are there.
ACCEPTED = {
    "good": (lambda data: None, ""),
    "annotation ids from 0": (put("annotations", "id", lambda entry: entry["id"] - 1), "numbered again"),
    "annotation ids are texts": (put("annotations", "id", lambda e: f"0000{e['id']}-ab"), "numbered again"),
    "annotation ids are doubles": (put("annotations", "id", lambda e: float(e["id"])), "numbered again"),
    "annotation ids beyond 64 bits": (put("annotations", "id", lambda e: e["id"] + 2**70), "numbered again"),
    "annotation ids missing": (drop("annotations", "id"), "numbered again"),
    "annotation ids duplicated": (put("annotations", "id", 1), "numbered again"),
    "polygons of two points": (put("annotations", "segmentation", [[5, 5, 30, 30]]), ""),
    "polygons that are flat lists": (put("annotations", "segmentation", [5, 33, 32, 33, 32, 60]), ""),
    "boxes of text": (put("annotations", "bbox", lambda e: [str(v) for v in e["bbox"]]), "written as text: 32"),
    "category ids of mixed types": (
        put("annotations", "category_id", lambda e: str(e["category_id"])),
        "written as text",
    ),
    "image ids that are UUIDs": (
        lambda data: (
            put("images", "id", lambda e: f"00-{e['id']}")(data),
            put("annotations", "image_id", lambda e: f"00-{e['image_id']}")(data),
        ),
        "",
    ),
    "image ids beyond 64 bits": (
        lambda data: (
            put("images", "id", lambda e: e["id"] + 2**64)(data),
            put("annotations", "image_id", lambda e: e["image_id"] + 2**64)(data),
        ),
        "",
    ),
    "image ids as numbers and as text": (put("annotations", "image_id", lambda e: str(e["image_id"])), ""),
    "sizes of text": (put("images", "width", "56"), "written as text: 4"),
    "sizes missing": (drop("images", "width"), "read from the image files"),
    "sizes of zero": (put("images", "height", 0), "read from the image files"),
    "sizes of words": (put("images", "height", "tall"), "read from the image files"),
    "names that are numbers": (put("categories", "name", lambda e: e["id"] * 7), "category names that are no text: 2"),
    "names that stand twice": (put("categories", "name", "same"), "completed by their ids"),
    "areas larger than their boxes": (put("annotations", "area", 1e12), "larger area than their box: 8"),
    "no area": (drop("annotations", "area"), "width x height"),
    "no iscrowd": (drop("annotations", "iscrowd"), "taken as 0"),
    "iscrowd as text": (put("annotations", "iscrowd", "false"), ""),
    "an image listed twice alike": (lambda data: data["images"].append(dict(data["images"][0])), "taken once"),
}
REFUSED = {
    "all crowd": (put("annotations", "iscrowd", 1), "only crowd regions, so that there is nothing to learn from"),
    "all ignored": (put("annotations", "ignore", True), "only crowd regions"),
    "nothing annotated": (lambda data: data["annotations"].clear(), "no boxes, so that there is nothing to learn from"),
    "item_id": (
        each("annotations", lambda e: e.update(item_id=e.pop("image_id"))),
        r"annotations without an image_id: 8 \(annotation 1, which has 'item_id'",
    ),
    "boxes that are objects": (
        put("annotations", "bbox", {"x": 1, "y": 2, "width": 3, "height": 4}),
        r"without a usable box: 8 \(1\.png, annotation 1: \{'x': 1.*\"bbox\" is \[x, y, width, height\]",
    ),
    "an empty box": (first(put("annotations", "bbox", [])), r"without a usable box: 1 \(1\.png, annotation 1: \[\]\)"),
    "a box of null": (
        first(put("annotations", "bbox", None)),
        r"without a usable box: 1 \(1\.png, annotation 1: None\)",
    ),
    "no box": (first(drop("annotations", "bbox")), "without a usable box: 1"),
    "a category without an id": (lambda data: data["categories"][0].pop("id"), r"unknown category: 4.*without an id"),
    "backslashes": (
        put("images", "file_name", lambda e: f"sub\\{e['file_name']}"),
        r"has backslashes: 4.*Write / in place",
    ),
    "addresses": (
        put("images", "file_name", lambda e: f"https://example.org/{e['file_name']}"),
        r"file_name is an address: 4 \(https://example\.org/1\.png",
    ),
    "a file listed twice in other words with other boxes": (
        lambda data: data["images"].append({**data["images"][0], "id": 77, "file_name": "./1.png"}),
        r"images listed twice with other boxes: 1",
    ),
    "missing images": (put("images", "file_name", lambda e: f"no{e['id']}.png"), r"images missing: 4 \(.*no1\.png"),
    "a file listed twice with other boxes": (
        lambda data: data["images"].append({**data["images"][0], "id": 77}),
        r"images listed twice with other boxes: 1 \(1\.png\)",
    ),
    "crowd of words": (put("annotations", "iscrowd", "many"), "neither yes nor no: 8"),
}


@pytest.fixture
def dataset(tmp_path):
    """Write a dataset with a mutation; return the config of a run that trains and evaluates on it."""
    names = []

    def write(mutate, encode=lambda text: text.encode()):
        data = make_dataset(tmp_path)
        mutate(data)
        (tmp_path / "data.json").write_bytes(encode(json.dumps(data, ensure_ascii=False)))
        names.append(f"case {tmp_path}")
        options = ["DATASETS.COCO_FORMAT", [[names[0], str(tmp_path / "data.json"), str(tmp_path)]]]
        options += ["DATASETS.TRAIN", (names[0],), "DATASETS.TEST", (names[0],), "MODEL.SAMDETR.NUM_CLASSES", 2]
        return tiny_config(*SHORT, *options)

    yield write
    for name in names:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


def perfect_ap(name, cfg):
    """The AP of detections that are the boxes of the dataset."""
    import torch
    from detectron2.structures import Boxes, BoxMode, Instances

    evaluator = build_evaluator(cfg, name, output_dir=None, tasks=("bbox",))
    evaluator.reset()
    for record in load_records(name):
        found = Instances((record["height"], record["width"]))
        boxes = torch.tensor([annotation["bbox"] for annotation in record["annotations"]])
        found.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        found.pred_classes = torch.tensor([annotation["category_id"] for annotation in record["annotations"]])
        found.scores = torch.full((len(boxes),), 0.9)
        evaluator.process([{"image_id": record["image_id"]}], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_harmless_is_repaired_and_counted(case, dataset, tmp_path, tool, caplog):
    mutate, message = ACCEPTED[case]
    cfg = dataset(mutate)
    status, printed = tool("check_dataset", tmp_path / "data.json", tmp_path)
    assert status == 0, printed
    with caplog.at_level(logging.INFO, logger="samdetr"):
        assert try_run(lambda: cfg, tmp_path / "run") == "accepted"
    assert message in printed and message in caplog.text
    assert sum(len(record["annotations"]) for record in load_records(cfg.DATASETS.TRAIN[0])) == 8
    assert perfect_ap(cfg.DATASETS.TEST[0], cfg) == pytest.approx(100)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_is_refused_before_the_first_step(case, dataset, tmp_path, tool):
    mutate, message = REFUSED[case]
    cfg = dataset(mutate)
    status, printed = tool("check_dataset", tmp_path / "data.json", tmp_path)
    assert status == 1 and "ERROR" in printed
    with pytest.raises(UserError, match=message):
        register_coco_format(cfg)
        load_records(cfg.DATASETS.TRAIN[0], training=True)
    assert try_run(lambda: cfg, tmp_path / "run") == "refused"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
def test_encodings(encoding, dataset, tmp_path):
    cfg = dataset(lambda data: data["categories"][0].update(name="Käfer"), lambda text: text.encode(encoding))
    if encoding == "latin-1":
        with pytest.raises(
            UserError, match=r"data\.json is not a text in UTF-8 \(byte 0xe4 at position \d+\).*Latin-1"
        ):
            register_coco_format(cfg)
    else:
        assert read_coco(tmp_path / "data.json", tmp_path).class_names == ["Käfer", "b"]
        assert try_run(lambda: cfg, tmp_path / "run") == "accepted"


def test_names_are_one_line_of_text(dataset, tmp_path):
    dataset(
        lambda data: data["categories"][0].update(name=" red\x1b[31m\nfox\ud800 "),
        lambda text: json.dumps(json.loads(text)).encode(),
    )
    names = read_coco(tmp_path / "data.json", tmp_path).class_names
    assert names == ["red\N{REPLACEMENT CHARACTER}[31m fox\N{REPLACEMENT CHARACTER}", "b"]


@pytest.mark.parametrize("flag", [1, "1", True, "yes", 1.0])
def test_ignored_boxes_are_crowd(flag, dataset, tmp_path):
    cfg = dataset(lambda data: data["annotations"][3].update(ignore=flag))
    assert read_coco(tmp_path / "data.json", tmp_path).crowd.tolist() == [False] * 3 + [True] + [False] * 4
    assert try_run(lambda: cfg, tmp_path / "run") == "accepted"


def turned(tmp_path):
    """Save the first image as a camera does that was held on its side."""
    exif = Image.Exif()
    exif[274] = 6
    image = Image.open(tmp_path / "1.png")
    image.save(tmp_path / "1.png", exif=exif)


def test_boxes_in_the_stored_orientation_of_a_photograph(dataset, tmp_path, tool, monkeypatch, caplog):
    """They are used with the picture as it is stored, and a warning says so."""
    from samdetr.data import images

    cfg = dataset(lambda data: None)
    turned(tmp_path)
    status, printed = tool("check_dataset", tmp_path / "data.json", tmp_path)
    assert status == 0 and "warning: images: annotated as it is stored, not as its EXIF orientation shows it" in printed
    monkeypatch.setattr(images, "_LOGGED", set())
    assert try_run(lambda: cfg, tmp_path / "run") == "accepted"
    assert "1.png: annotated as it is stored" in caplog.text


def test_boxes_in_the_upright_orientation_of_a_photograph(dataset, tmp_path):
    cfg = dataset(lambda data: data["images"][0].update(width=40, height=56))
    turned(tmp_path)
    assert try_run(lambda: cfg, tmp_path / "run") == "accepted"


@pytest.mark.parametrize("annotations", [[], None])
def test_a_validation_set_without_annotations_is_said_before_training(annotations, dataset, tmp_path, caplog):
    """None: the key is missing, as in COCO's test sets."""
    cfg = dataset(lambda data: None)
    data = make_dataset(tmp_path)
    del data["annotations"]
    (tmp_path / "val.json").write_text(json.dumps(data if annotations is None else {**data, "annotations": []}))
    entry = [f"val {tmp_path}", str(tmp_path / "val.json"), str(tmp_path)]
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, entry]
    cfg.DATASETS.TEST = (entry[0],)
    with caplog.at_level(logging.INFO, logger="samdetr"):
        assert try_run(lambda: cfg, tmp_path / "run") == "accepted"
    said = caplog.text.index(f"{entry[0]} has no annotated objects: there will be no AP")
    assert said < caplog.text.index("Starting training")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["results"] == {}


def test_a_broken_validation_file_is_refused_before_training(dataset, tmp_path):
    cfg = dataset(lambda data: None)
    data = make_dataset(tmp_path)
    data["annotations"][0].pop("bbox")
    (tmp_path / "val.json").write_text(json.dumps(data))
    cfg.DATASETS.COCO_FORMAT = [
        *cfg.DATASETS.COCO_FORMAT,
        [f"val {tmp_path}", str(tmp_path / "val.json"), str(tmp_path)],
    ]
    cfg.DATASETS.TEST = (f"val {tmp_path}",)
    assert try_run(lambda: cfg, tmp_path / "run") == "refused"
    assert not list((tmp_path / "run").glob("metrics*"))


def test_capacity_that_loses_data_is_said_once(dataset, tmp_path, caplog):
    def crowd(data):
        for entry in data["annotations"]:
            if entry["image_id"] == 1:
                entry["iscrowd"] = 1

    cfg = dataset(crowd)
    cfg.MODEL.SAMDETR.NUM_QUERIES = cfg.TEST.DETECTIONS_PER_IMAGE = 1
    assert try_run(lambda: cfg, tmp_path / "run") == "accepted"
    name = re.escape(cfg.DATASETS.TRAIN[0])
    for message, times in (
        (
            rf"{name}: 3 images have more boxes than MODEL\.SAMDETR\.NUM_QUERIES \(1\), up to 2 in .*not learned in a step",
            1,
        ),
        (rf"{name}: 3 images have more boxes than TEST\.DETECTIONS_PER_IMAGE \(1\), .*cannot be found", 1),
        (rf"{name}: 1 images have only crowd regions, the first is .*1\.png", 1),
    ):
        assert len(re.findall(message, caplog.text)) == times, message


def test_boxes_of_whole_numbers_are_scaled_like_others(dataset, tmp_path):
    """detectron2 would cut off their fractions after resizing."""
    from samdetr.data import build_train_loader

    cfg = dataset(lambda data: None)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (57,), "none"
    cfg.INPUT.DETR_CROP.PROB = 0.0
    register_coco_format(cfg)
    inputs = next(iter(build_train_loader(cfg)))[0]
    record = next(r for r in load_records(cfg.DATASETS.TRAIN[0]) if r["image_id"] == inputs["image_id"])
    height, width = inputs["image"].shape[1:]
    x, y, w, h = record["annotations"][0]["bbox"]
    scaled = [x * width / 56, y * height / 40, (x + w) * width / 56, (y + h) * height / 40]
    assert inputs["instances"].gt_boxes.tensor[0].tolist() == pytest.approx(scaled, abs=1e-3)
    assert copy.deepcopy(record)["annotations"][0]["bbox"] == [float(v) for v in (x, y, w, h)]


def test_completed_names_are_unique(dataset, tmp_path):
    def rename(data):
        data["categories"] = [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}, {"id": 3, "name": "a (1)"}]

    dataset(rename)
    names = read_coco(tmp_path / "data.json", tmp_path).class_names
    assert len(set(names)) == 3 and names[2] == "a (1)"


def test_names_keep_the_joiners_that_languages_write_with(dataset, tmp_path):
    dataset(lambda data: data["categories"][0].update(name="\u0645\u06cc\u200c\u062e"))
    assert read_coco(tmp_path / "data.json", tmp_path).class_names[0] == "\u0645\u06cc\u200c\u062e"


def test_a_name_belongs_to_one_file_and_folder(dataset, tmp_path):
    cfg = dataset(lambda data: None)
    name, json_file, _ = cfg.DATASETS.COCO_FORMAT[0]
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, [name, json_file, str(tmp_path.parent)]]
    with pytest.raises(UserError, match=r"belongs to .*choose another"):
        register_coco_format(cfg)
    cfg.DATASETS.COCO_FORMAT = [["elsewhere", "https://example.org/a.json", str(tmp_path)]]
    with pytest.raises(UserError, match=r"https://example\.org/a\.json is an address: download it"):
        register_coco_format(cfg)


def test_long_thin_pictures_keep_a_line(dataset, tmp_path):
    def thin(data):
        Image.new("RGB", (3, 1000)).save(tmp_path / "1.png")
        data["images"][0].update(width=3, height=1000)

    assert try_run(lambda: dataset(thin), tmp_path / "run") == "accepted"
