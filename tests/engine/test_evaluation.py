"""samdetr.engine.evaluation: image by image, it agrees with the run's evaluation."""

import html
import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from helpers import tiny_config
from samdetr.analysis import confusion_matrix, read_results
from samdetr.checkpoint import describe_run
from samdetr.data import load_records, register_datasets
from samdetr.data.datasets import class_names_of
from samdetr.engine.evaluation import build_evaluator, evaluate_images, f1, write_results
from samdetr.errors import UserError


def test_f1_by_hand():
    record = {
        "annotations": [
            {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
            {"bbox": [20, 20, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2},
        ]
    }
    found = Instances((40, 40))
    # A hit, the same box again, the right place with the wrong class, and one below the threshold.
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 1, 3, 2])
    assert f1(record, found, 0.3) == pytest.approx(2 * 1 / (2 + 3))
    assert f1(record, found, 0.05) == pytest.approx(2 * 2 / (2 + 4))
    assert f1({"annotations": []}, found, 0.95) == 1.0


def load_with_a_function(name, file, root):
    """Register a dataset as detectron2's tutorial does, with a function that reads a file."""
    DatasetCatalog.register(name, lambda: load_coco_json(file, root, name))
    MetadataCatalog.get(name).set(json_file=file, image_root=root)


def perfect_detections(folder, boxes, first_id, register=None, **options):
    """Evaluate detections that are the ground truth: ``boxes`` of one class in each of two images."""
    name = f"perfect_{folder.name}"
    corners = [[10 * (i % 20), 10 * (i // 20), 8, 8] for i in range(boxes)]
    annotations = [
        {"id": first_id + number, "image_id": image, "category_id": 1, "bbox": box, "area": 64, "iscrowd": 0}
        for number, (image, box) in enumerate((image, box) for image in (1, 2) for box in corners)
    ]
    images = [{"id": image, "file_name": f"{image}.png", "width": 200, "height": 200} for image in (1, 2)]
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "perfect.json").write_text(json.dumps(content))
    if register is None:
        register_coco_instances(name, {}, str(folder / "perfect.json"), str(folder))
    else:
        register(name, str(folder / "perfect.json"), str(folder))
    try:
        DatasetCatalog.get(name)  # which fills in the metadata
        cfg = tiny_config(*(item for pair in options.items() for item in pair))
        evaluator = build_evaluator(cfg, name, output_dir=None, tasks=("bbox",))
        evaluator.reset()
        found = Instances((200, 200))
        found.pred_boxes = Boxes(BoxMode.convert(torch.tensor(corners).float(), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        found.scores, found.pred_classes = torch.linspace(0.9, 0.5, boxes), torch.zeros(boxes, dtype=torch.long)
        evaluator.process([{"image_id": image} for image in (1, 2)], 2 * [{"instances": found}])
        return evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("register", [None, load_with_a_function])
@pytest.mark.parametrize("first_id", [0, 1, 10**6])
def test_perfect_detections_have_an_ap_of_100_whatever_the_annotations_ids(tmp_path, first_id, register):
    assert perfect_detections(tmp_path, boxes=3, first_id=first_id, register=register)["AP"] == pytest.approx(100)


def test_another_evaluation_than_cocos_is_said_to_be_coco(tmp_path, caplog):
    def register(name, file, root):
        load_with_a_function(name, file, root)
        MetadataCatalog.get(name).set(evaluator_type="lvis")

    perfect_detections(tmp_path, boxes=3, first_id=1, register=register)
    assert "is evaluated as COCO is, not as 'lvis'" in caplog.text


@pytest.mark.parametrize(("limit", "expected"), [(100, 66.34), (150, 100)])
def test_more_than_a_hundred_objects_count_if_that_many_are_detected(tmp_path, limit, expected):
    results = perfect_detections(tmp_path, boxes=150, first_id=1, **{"TEST.DETECTIONS_PER_IMAGE": limit})
    assert results["AP"] == pytest.approx(expected, abs=0.01)


def test_results_without_boxes_are_null_in_the_file(tmp_path):
    cfg = tiny_config("OUTPUT_DIR", str(tmp_path))
    write_results(cfg, {"bbox": {"AP": 12.5, "APl": float("nan")}}, "evaluation.json", "weights.pth")
    text = (tmp_path / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["results"] == {"bbox": {"AP": 12.5, "APl": None}}


class Repeats(torch.nn.Module):
    """A model that detects the same boxes in every image."""

    device = torch.device("cpu")

    def __init__(self, boxes, labels):
        super().__init__()
        self.boxes, self.labels = torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels).long()

    def forward(self, batch):
        found = []
        for inputs in batch:
            instances = Instances((inputs["height"], inputs["width"]))
            instances.pred_boxes, instances.pred_classes = Boxes(self.boxes), self.labels
            instances.scores = torch.linspace(0.9, 0.5, len(self.labels))
            found.append({"instances": instances})
        return found


@pytest.fixture
def registered(shapes_root, tmp_path):
    """Register the shapes' annotations after a change; returns the dataset's name."""
    names = []

    def register(change):
        content = json.loads((shapes_root / "annotations.json").read_text())
        change(content)
        names.append(f"shapes_{len(names)}")
        (tmp_path / f"{names[-1]}.json").write_text(json.dumps(content))
        register_coco_instances(names[-1], {}, str(tmp_path / f"{names[-1]}.json"), str(shapes_root))
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_evaluated_images_come_back_in_cocos_format_with_the_datasets_ids(registered, shapes_root):
    """Also where the dataset has its classes in another order than the model."""

    def renumber(content):
        for entry in [*content["annotations"], *content["categories"]]:
            key = "category_id" if "category_id" in entry else "id"
            entry[key] = {1: 9, 2: 4}[entry[key]]

    model = Repeats([[1, 2, 21, 32], [5, 5, 15, 15]], [0, 1])  # green, red
    name = registered(renumber)
    evaluation = evaluate_images(tiny_config(), model, name, 3, 0.3, ["green", "red"])
    truth = json.loads((shapes_root / "annotations.json").read_text())
    assert [image["id"] for image in evaluation.ground_truth["images"]] == [1, 2, 3]
    assert evaluation.ground_truth["categories"] == [{"id": 4, "name": "red"}, {"id": 9, "name": "green"}]
    expected = [entry["bbox"] for entry in truth["annotations"] if entry["image_id"] <= 3]
    assert [entry["bbox"] for entry in evaluation.ground_truth["annotations"]] == expected
    found = [[entry[key] for key in ("image_id", "category_id", "bbox")] for entry in evaluation.coco_detections]
    assert sorted(found) == sorted(
        [image, category, box] for image in (1, 2, 3) for category, box in ((9, [1, 2, 20, 30]), (4, [5, 5, 10, 10]))
    )
    for label, class_name in enumerate(("red", "green")):
        assert evaluation.class_ap[label, 0] == pytest.approx(evaluation.results[f"AP-{class_name}"], nan_ok=True)


def test_class_names_with_odd_white_space_are_those_of_the_model(shapes_root, tmp_path):
    """A dataset that detectron2 has loaded and named first, and one that a function makes."""
    register_coco_instances("odd_names", {}, str(shapes_root / "annotations.json"), str(shapes_root))
    DatasetCatalog.register("made_with_odd_names", lambda: load_records("odd_names"))
    try:
        for name in ("odd_names", "made_with_odd_names"):
            MetadataCatalog.get(name).thing_classes = ["green ", " red\n"]
            assert class_names_of(name) == ["green", "red"]
            names = describe_run(tiny_config("DATASETS.TRAIN", (name,), "MODEL.SAMDETR.NUM_CLASSES", 2))["class_names"]
            assert names == ["green", "red"]
            assert [r["annotations"] for r in load_records(name, names)] == [
                r["annotations"] for r in load_records(name)
            ]
            build_evaluator(tiny_config(), name, str(tmp_path)).use_classes(names)  # otherwise an error
    finally:
        for name in ("odd_names", "made_with_odd_names"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("ids", [None, {4: 0, 9: 1}])
def test_a_dataset_without_a_file_is_evaluated_by_its_cleaned_boxes_again_and_again(ids, shapes_root):
    """The whole of a box that reaches over the edge, and one without area, would count as objects that nothing can find."""
    boxes = [([1, 2, 21, 32], 0), ([60, 60, 500, 500], 1), ([5, 5, 5, 9], 1)]
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label} for box, label in boxes]
    size = {"height": 72, "width": 72}
    record = {"file_name": str(shapes_root / "1.png"), "image_id": 1, **size, "annotations": annotations}
    DatasetCatalog.register("made_by_a_function", lambda: [record])
    MetadataCatalog.get("made_by_a_function").thing_classes = ["a", "b"]
    if ids:
        MetadataCatalog.get("made_by_a_function").thing_dataset_id_to_contiguous_id = ids
    cfg, model = tiny_config(), Repeats([[1, 2, 21, 32], [60, 60, 72, 72]], [0, 1])
    try:
        for _ in range(2):
            evaluation = evaluate_images(cfg, model, "made_by_a_function", None, 0.3, ["a", "b"])
            assert evaluation.results["AP"] == pytest.approx(100)
            assert [e["category_id"] for e in evaluation.ground_truth["annotations"]] == list(ids or {0: 0, 1: 1})
        assert not MetadataCatalog.get("made_by_a_function").get("json_file")
        annotations[0]["category_id"] = 7
        with pytest.raises(
            UserError, match=r"'made_by_a_function'.* has an object of class 7, but there are 2 classes"
        ):
            evaluate_images(cfg, model, "made_by_a_function", None, 0.3)
    finally:
        DatasetCatalog.remove("made_by_a_function")
        MetadataCatalog.remove("made_by_a_function")


@pytest.fixture
def made(shapes_root):
    """Register a dataset of two images that a function makes, with given ids of the images, class of the box and metadata."""

    def make(image_ids=(1, 2), label=0, **metadata):
        box = {"bbox": [1, 2, 21, 32], "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
        size = {"file_name": str(shapes_root / "1.png"), "height": 72, "width": 72}
        DatasetCatalog.register("made", lambda: [{**size, "image_id": i, "annotations": [box]} for i in image_ids])
        MetadataCatalog.get("made").set(**metadata)
        return tiny_config("DATASETS.TEST", ("made",))

    yield make
    DatasetCatalog.remove("made")
    MetadataCatalog.remove("made")


def test_aps_of_classes_have_their_names_in_any_order_of_the_ids(made):
    cfg = made(thing_classes=["none", "found"], label=1, thing_dataset_id_to_contiguous_id={100: 0, 99: 1})
    results = evaluate_images(cfg, Repeats([[1, 2, 21, 32]], [1]), "made", None, 0.3, ["none", "found"]).results
    assert results["AP-found"] == pytest.approx(100) and math.isnan(results["AP-none"])


def test_a_dataset_without_class_names_has_those_of_the_model(made):
    """Of which the highest need not be in it."""
    results = evaluate_images(made(), Repeats([[1, 2, 21, 32]], [9]), "made", None, 0.3).results
    assert results["AP"] == 0.0


def test_image_ids_of_numpy_are_numbers(made, tmp_path):
    evaluator = build_evaluator(made(image_ids=np.arange(2)), "made", str(tmp_path))
    assert [type(image["id"]) for image in evaluator.ground_truth({0, 1})["images"]] == [int, int]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_ids": (1, "2")}, "'image_id' is a text in some records and a number in others, such as record 1"),
        ({"label": 2, "thing_classes": ["a", "b"]}, "object of class 2, but there are 2 classes, counted from 0"),
        ({"label": 10}, "object of class 10 in image 1, but there are 10 classes"),
        (
            {"thing_classes": ["a", "b"], "thing_dataset_id_to_contiguous_id": {1: 0, 2: 0}},
            "thing_dataset_id_to_contiguous_id must name each of its 2 classes' indices once",
        ),
        ({"thing_classes": ["a"], "thing_dataset_id_to_contiguous_id": {"cat": 0}}, "the key 'cat' of the type str"),
        ({"thing_classes": ["a"], "thing_dataset_id_to_contiguous_id": {np.int64(3): 0}}, "of the type int64: use"),
    ],
)
def test_mistakes_in_datasets_that_a_function_makes(arguments, message, made):
    with pytest.raises(UserError, match=message):
        build_evaluator(made(**arguments), "made", None)


@pytest.mark.parametrize("key", ["VOC_FORMAT", "YOLO_FORMAT"])
def test_other_formats_come_back_in_cocos_format(tmp_path, key):
    """A box of 20 x 40 pixels at the left edge, with special characters in its class's name; difficult ones are crowd."""
    name = "<a> & b"
    images = tmp_path / ("JPEGImages" if key == "VOC_FORMAT" else "images")
    images.mkdir()
    Image.new("RGB", (80, 40)).save(images / "one.png")
    if key == "VOC_FORMAT":
        for folder in ("Annotations", "ImageSets/Main"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("one\n")
        objects = "".join(
            f"<object><name>{html.escape(name)}</name><difficult>{difficult}</difficult><bndbox><xmin>1</xmin>"
            f"<ymin>1</ymin><xmax>{right}</xmax><ymax>40</ymax></bndbox></object>"
            for difficult, right in ((0, 20), (1, 80))
        )
        (tmp_path / "Annotations" / "one.xml").write_text(
            f"<annotation><filename>one.png</filename>{objects}</annotation>"
        )
        entry = [key, str(tmp_path), "val"]
    else:
        (tmp_path / "labels").mkdir()
        (tmp_path / "labels" / "one.txt").write_text("0 0.125 0.5 0.25 1\n")
        (tmp_path / "data.yaml").write_text(json.dumps({"val": "images", "names": [name]}))
        entry = [key, str(tmp_path / "data.yaml"), "val"]
    cfg = tiny_config(f"DATASETS.{key}", [entry], "DATASETS.TEST", (key,))
    register_datasets(cfg)
    try:
        evaluation = evaluate_images(cfg, Repeats([[0, 0, 20, 40]], [0]), key, None, 0.3, [name])
    finally:
        DatasetCatalog.remove(key)
        MetadataCatalog.remove(key)
    results = read_results(evaluation.ground_truth, evaluation.coco_detections)
    assert results.class_names == [name] and results.object_counts().tolist() == [1]
    assert results.crowd.tolist() == ([False, True] if key == "VOC_FORMAT" else [False])
    assert evaluation.class_ap[0, :3].tolist() == pytest.approx([100] * 3)
    assert confusion_matrix(results, 0.3).tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize(
    ("boxes", "change"),
    [
        ([], lambda content: None),
        ([[1, 2, 21, 32]], lambda content: content.update(annotations=[])),
        ([[1, 2, 21, 32]], lambda content: content.pop("annotations")),
        ([], lambda content: content.pop("annotations")),
    ],
)
def test_without_detections_or_objects_there_is_no_ap(registered, boxes, change):
    evaluation = evaluate_images(tiny_config(), Repeats(boxes, [0] * len(boxes)), registered(change), None, 0.3)
    assert len(evaluation.records) == 6 and len(evaluation.coco_detections) == 6 * len(boxes)
    assert all(math.isnan(evaluation.results[name]) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl"))
    assert torch.tensor(evaluation.class_ap).isnan().all() and evaluation.class_ap.shape == (2, 6)
    assert evaluation.precision.shape == (10, 101) and not evaluation.precision.any()


@pytest.mark.slow
def test_image_by_image_it_agrees_with_the_run(run_folder):
    """AP of all images, as COCOEvaluator has written it at the end of the run."""
    import samdetr

    predictor = samdetr.load(run_folder / "model_final.pth", device="cpu")
    evaluation = evaluate_images(predictor.cfg, predictor.model, predictor.cfg.DATASETS.TEST[0], None, 0.3)
    written = json.loads((run_folder / "evaluation.json").read_text())["results"]["bbox"]
    written = {name: math.nan if value is None else value for name, value in written.items()}
    assert evaluation.results == pytest.approx(written, abs=1e-6, nan_ok=True)
    assert len(evaluation.records) == len(evaluation.detections) == len(evaluation.quality) == 20
    assert evaluation.precision.shape == (10, 101)
    assert 100 * evaluation.precision.mean() == pytest.approx(written["AP"], abs=1e-6)


def test_results_on_other_datasets_are_not_overwritten(tmp_path):
    for name, ap in (("first", 1.0), ("second", 2.0), ("second", 3.0)):
        cfg = tiny_config("DATASETS.TEST", (name,), "OUTPUT_DIR", str(tmp_path))
        write_results(cfg, {"bbox": {"AP": ap}}, "evaluation_model.json", "model.pth")
    found = {path.name: json.loads(path.read_text())["results"]["bbox"]["AP"] for path in tmp_path.iterdir()}
    assert found == {"evaluation_model_first.json": 1.0, "evaluation_model.json": 3.0}
