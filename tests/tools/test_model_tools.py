"""The tools that use a trained model, with the checkpoint of a short run."""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from helpers import ROOT
from processes import train_net
from samdetr.data.datasets import read_dataset


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_bad_file_does_not_stop_the_others(tool, run_folder, pictures, tmp_path, batch_size):
    (pictures / "broken.png").write_text("no image")
    output = tmp_path / "out"
    arguments = ["--input", pictures, "--output", output, "--score-threshold", 0.005, "--batch-size", batch_size]
    status, printed = tool("predict", "--weights", run_folder / "model_final.pth", *arguments)
    assert status == 1 and "broken.png is not an image" in printed and "1 files could not be done" in printed
    drawn = {str(path.relative_to(output)) for path in output.rglob("*") if path.suffix in (".png", ".jpg")}
    assert drawn == {"one.png", "two.jpg", "below/one.png"}
    detections = json.loads((output / "predictions.json").read_text())
    assert {d["file_name"] for d in detections} == {str(pictures / name) for name in drawn}
    assert len({d["image_id"] for d in detections}) == 3
    assert all(len(d["bbox"]) == 4 and d["bbox"][2] > 0 and 0 < d["score"] < 1 for d in detections)


@pytest.mark.slow
def test_predictions_are_written_as_they_are_found(tool, run_folder, pictures, tmp_path, monkeypatch):
    """So that any number of images needs no memory; what was found is a whole file, whatever ends the tool."""
    from samdetr.cli import predict

    written = []
    run_images = predict.Prediction.run_images

    def interrupted(self, files):
        if len(written) == 2:
            raise KeyboardInterrupt
        run_images(self, files)
        self.results.file.flush()
        written.append((tmp_path / "out" / "predictions.json.part0").stat().st_size)

    monkeypatch.setattr(predict.Prediction, "run_images", interrupted)
    arguments = ["--weights", run_folder / "model_final.pth", "--input", pictures, "--output", tmp_path / "out"]
    status, _ = tool("predict", *arguments, "--no-drawings")
    assert status == 128 + signal.SIGINT
    assert 0 < written[0] < written[1]
    detections = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {d["image_id"] for d in detections} == {1, 2}


@pytest.mark.slow
def test_files_that_are_left_out_are_named_and_large_ones_have_an_option(tool, run_folder, pictures, tmp_path, caplog):
    (pictures / "notes.txt").write_text("")
    (pictures / ".hidden").write_text("")
    (pictures / "one.png").rename(pictures / "one.jfif")
    arguments = ["--weights", run_folder / "model_final.pth", "--input", pictures, "--output", tmp_path / "out"]
    status, printed = tool("predict", *arguments)
    assert status == 0 and printed.startswith("3 files")
    assert (
        "1 files are left out, since their names do not end as those of images or videos do: notes.txt." in caplog.text
    )
    status, printed = tool("predict", *arguments, "--max-pixels", 100 * 120)
    assert status == 1 and printed.count("more than INPUT.MAX_PIXELS (12000)") == 2


@pytest.mark.slow
def test_what_is_no_file_is_refused(tool, run_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name, message in (("pipe.jpg", "is a pipe, not a file"), ("loop.jpg", "Too many levels of symbolic links")):
        arguments = ["--input", tmp_path / name, "--output", tmp_path / "out"]
        status, _ = tool("predict", "--weights", run_folder / "model_final.pth", *arguments)
        assert status.startswith("error: --input: ") and message in status


# TeX, HTML, control characters, and what matplotlib takes for half of a formula.
ODD_NAMES = [
    "$\\frac{1}{0}$",
    "$a",
    "<b>bold</b>",
    "red\x1b[31m\n",
    "a & b",
    "\\alpha",
    "$x$ and $y$",
    "&lt;",
    "%s {}",
    "\ud800",
]


@pytest.mark.slow
def test_names_are_drawn_as_text(tool, run_folder, pictures, tmp_path):
    data = torch.load(run_folder / "model_final.pth", weights_only=True)
    data["class_names"] = ODD_NAMES
    torch.save(data, tmp_path / "odd.pth")
    arguments = ["--weights", tmp_path / "odd.pth", "--input", pictures, "--output", tmp_path / "out"]
    status, printed = tool("predict", *arguments, "--score-threshold", 0.0)
    assert status == 0, printed
    plain = ["--weights", run_folder / "model_final.pth", "--input", pictures, "--output", tmp_path / "plain"]
    assert tool("predict", *plain, "--score-threshold", 0.0)[0] == 0
    drawn = [np.asarray(Image.open(tmp_path / folder / "two.jpg")) for folder in ("out", "plain")]
    assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)  # the same boxes with other names
    arguments = ["--weights", tmp_path / "odd.pth", "--input", pictures / "two.jpg", "--output", tmp_path / "attention"]
    status, printed = tool("visualize_attention", *arguments, "--score-threshold", 0.0)
    assert status == 0, printed
    assert list((tmp_path / "attention").glob("two-query*.png"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "message"), [(ODD_NAMES[:4], "There are 4 class names for a model of 10"), ([3] * 10, "")]
)
def test_class_lists_that_do_not_fit_are_refused(names, message, tool, run_folder, pictures, tmp_path):
    data = torch.load(run_folder / "model_final.pth", weights_only=True)
    data["class_names"] = names
    torch.save(data, tmp_path / "odd.pth")
    status, _ = tool("predict", "--weights", tmp_path / "odd.pth", "--input", pictures, "--output", tmp_path / "out")
    assert status.startswith("error: ") and message in status


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        *("NUM_QUERIES: 1000000000", "NUM_QUERIES: 90000", "HIDDEN_DIM: 8192", "NUM_CLASSES: -1", "NUM_HEADS: []"),
        *("NUM_QUERIES: !!python/object/apply:os.system ['touch this_code_has_run']", "NUM_QUERIES: [", "FOO: 1"),
    ],
)
def test_a_damaged_config_in_a_checkpoint_is_refused(line, tool, run_folder, pictures, tmp_path, monkeypatch):
    """Before memory is taken for what it asks for, and before code in it runs."""
    monkeypatch.chdir(tmp_path)
    data = torch.load(run_folder / "model_final.pth", weights_only=True)
    key = line.split(":")[0]
    kept = [text for text in data["config"].splitlines() if not text.startswith(f"    {key}:")]
    index = kept.index("  SAMDETR:")
    data["config"] = "\n".join([*kept[: index + 1], f"    {line}", *kept[index + 1 :]])
    torch.save(data, tmp_path / "odd.pth")
    status, _ = tool("predict", "--weights", tmp_path / "odd.pth", "--input", pictures, "--output", tmp_path / "out")
    assert status.startswith("error: ") and not (tmp_path / "this_code_has_run").exists()


@pytest.fixture
def renumbered(tmp_path):
    """The tiny run's validation set with its classes in another order, under other ids; and with another name."""
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get("digits_val_20")
    data = read_dataset("digits_val_20").ground_truth()
    new_ids = {entry["id"]: (7 * entry["id"]) % 11 + 5 for entry in data["categories"]}
    for entry in data["annotations"]:
        entry["category_id"] = new_ids[entry["category_id"]]
    for entry in data["categories"]:
        entry["id"] = new_ids[entry["id"]]
    (tmp_path / "renumbered.json").write_text(json.dumps(data))
    data["categories"][0]["name"] = "nought"
    (tmp_path / "renamed.json").write_text(json.dumps(data))
    entries = [[name, str(tmp_path / f"{name}.json"), metadata.image_root] for name in ("renumbered", "renamed")]
    return ["DATASETS.COCO_FORMAT", repr(entries)]


@pytest.mark.slow
def test_classes_of_the_test_set_are_matched_by_name(tool, run_folder, renumbered, tmp_path):
    weights = [
        "--eval-only",
        "MODEL.WEIGHTS",
        run_folder / "model_final.pth",
        "OUTPUT_DIR",
        tmp_path / "out",
        *renumbered,
    ]
    result = train_net(*weights, "DATASETS.TEST", "('renumbered',)")
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "evaluation_model_final.json").read_text())["results"]["bbox"]
    expected = json.loads((run_folder / "evaluation.json").read_text())["results"]["bbox"]
    assert expected["AP"] > 0 and found == pytest.approx(expected)  # of each class as well
    result = train_net(*weights, "DATASETS.TEST", "('renamed',)")
    assert result.returncode == 1
    assert "'renamed' does not fit the model: of its 10 classes, it alone has 'nought', and lacks '0'" in result.stderr


@pytest.mark.slow
def test_the_report_matches_classes_by_name(tool, run_folder, renumbered, tmp_path):
    data = torch.load(run_folder / "model_final.pth", weights_only=True)
    pages = []
    for name in ("digits_val_20", "renumbered"):
        cfg = yaml.safe_load(data["config"])
        cfg["DATASETS"].update(TEST=[name], COCO_FORMAT=ast.literal_eval(renumbered[1]))
        torch.save({**data, "config": yaml.dump(cfg)}, tmp_path / f"{name}.pth")
        arguments = ["--input", run_folder, "--weights", tmp_path / f"{name}.pth", "--max-images", 20]
        status, printed = tool("report", *arguments, "--output", tmp_path / f"{name}.html")
        assert not status, printed
        pages.append((tmp_path / f"{name}.html").read_text())
    tables = [re.search(r"<h2>By class</h2>(.*?)</section>", page)[1] for page in pages]
    numbers = [re.search(r"<div class=numbers>(.*?)</header>", page)[1] for page in pages]
    assert tables[0] == tables[1] and numbers[0] == numbers[1]


@pytest.mark.slow
def test_inputs_are_never_overwritten(tool, run_folder, pictures, tmp_path):
    weights = run_folder / "model_final.pth"
    before = (pictures / "one.png").read_bytes()
    for arguments in (
        ["--input", pictures, "--output", pictures],
        ["--input", pictures / "one.png", "--output", pictures],
    ):
        status, _ = tool("predict", "--weights", weights, *arguments)
        assert "would overwrite the input" in status
    assert (pictures / "one.png").read_bytes() == before
    (tmp_path / "file").write_text("")
    status, _ = tool("predict", "--weights", weights, "--input", pictures, "--output", tmp_path / "file")
    assert "cannot be created as a folder" in status


@pytest.mark.slow
def test_drawings_do_not_overwrite_each_other(tool, run_folder, pictures):
    """Names that differ in their ending only; a file given twice; drawings of an earlier run below the inputs."""
    image = Image.open(pictures / "two.jpg")
    image.save(pictures / "two.bmp")
    arguments = ["--weights", run_folder / "model_final.pth", "--output", pictures / "out"]
    inputs = ["--input", pictures, pictures / "two.jpg"]
    for _ in range(2):
        status, printed = tool("predict", *arguments, *inputs)
        assert (status == 0 and printed.startswith("4 files")) or "4 files" in printed
    names = {str(path.relative_to(pictures / "out")) for path in (pictures / "out").rglob("*.*g")}
    assert names == {"one.png", "two.jpg", "two-2.jpg", "below/one.png"}


@pytest.mark.slow
def test_thin_images(tool, run_folder, tmp_path):
    Image.new("RGB", (3000, 1), "red").save(tmp_path / "thin.png")
    arguments = ["--input", tmp_path / "thin.png", "--output", tmp_path / "out"]
    assert tool("predict", "--weights", run_folder / "model_final.pth", *arguments)[0] == 0
    assert json.loads((tmp_path / "out" / "predictions.json").read_text())


def test_inputs_below_the_output_folder_are_inputs(tool, run_folder, pictures, monkeypatch):
    monkeypatch.chdir(pictures.parent)
    status, printed = tool("predict", "--weights", run_folder / "model_final.pth", "--input", pictures, "--output", ".")
    assert not status and f"{len(list(pictures.iterdir()))} files" in printed


@pytest.mark.slow
def test_predictions_of_a_dataset_can_be_evaluated(tool, run_folder, tmp_path):
    """Files named by numbers keep them, so that pycocotools matches predictions and ground truth."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets.coco import convert_to_coco_dict
    from pycocotools.coco import COCO

    import samdetr  # noqa: F401, registers the dataset

    records = DatasetCatalog.get("digits_val_20")[:4]
    truth = COCO()
    truth.dataset = convert_to_coco_dict("digits_val_20")
    truth.createIndex()
    files = [record["file_name"] for record in records]
    status, printed = tool(
        "predict", "--weights", run_folder / "model_final.pth", "--input", *files, "--output", tmp_path, "--no-drawings"
    )
    assert status in (0, None) and "4 files" in printed
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert {entry["image_id"] for entry in results} == {record["image_id"] for record in records}
    assert len(truth.loadRes(results).anns) == len(results)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_videos(tool, run_folder, tmp_path):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (96, 64))
    for i in range(5):
        writer.write(np.full((64, 96, 3), 40 * i, np.uint8))
    writer.release()
    (tmp_path / "broken.mp4").write_text("no video")
    Image.new("RGB", (96, 64)).save(tmp_path / "later.png")
    status, printed = tool(
        *("predict", "--weights", run_folder / "model_final.pth", "--output", tmp_path / "out", "--score-threshold", 0),
        *("--input", tmp_path / "broken.mp4", tmp_path / "film.mp4", tmp_path / "later.png"),
    )
    assert status == 1 and "broken.mp4 is not a video" in printed
    capture = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and capture.get(cv2.CAP_PROP_FPS) == 10
    detections = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {d["frame"] for d in detections if "frame" in d} == set(range(5))
    ids = [d["image_id"] for d in detections]
    assert ids == sorted(ids) and set(ids) == {2, 3}  # in the order of the inputs


@pytest.mark.slow
def test_objects_are_followed_through_a_video(tool, run_folder, tmp_path):
    """What is found keeps its number and nearly its place while the picture moves by two pixels per frame."""
    import cv2

    pytest.importorskip("trackers", reason="needs: pip install trackers")
    picture = Image.open(Path(os.environ["DETECTRON2_DATASETS"]) / "samdetr_digits_v1" / "val" / "000001.jpg")
    writer = cv2.VideoWriter(str(tmp_path / "film.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 10, (128, 128))
    for i in range(5):
        writer.write(np.roll(np.asarray(picture), 2 * i, axis=1))
    writer.release()
    weights = ["--weights", run_folder / "model_final.pth", "--output", tmp_path / "out"]
    status, _ = tool("predict", *weights, "--input", tmp_path / "film.mp4", "--track", "--score-threshold", 0)
    assert status == 0 and (tmp_path / "out" / "film.mp4").exists()
    frames = [{} for _ in range(5)]
    for entry in json.loads((tmp_path / "out" / "predictions.json").read_text()):
        assert (entry["track_id"] is None) or entry["frame"] > 0
        if entry["track_id"] is not None:
            assert entry["track_id"] not in frames[entry["frame"]]  # once per frame
            x, y, width, height = entry["bbox"]
            frames[entry["frame"]][entry["track_id"]] = (x + width / 2, y + height / 2)
    assert not frames[0] and len(frames[1]) > 10
    followed = [number for number in frames[1] if all(number in frame for frame in frames[2:])]
    assert len(followed) > len(frames[1]) / 2
    for before, after in pairwise(frames[1:]):
        moved = [np.abs(np.subtract(after[number], before[number])).max() for number in followed]
        assert np.median(moved) < 5


def test_what_track_needs_is_said_before_anything_is_done(tool, pictures, tmp_path, monkeypatch):
    arguments = ["--weights", "no.pth", "--input", pictures, "--track", "--output", tmp_path / "out"]
    status, _ = tool("predict", *arguments)
    assert status.startswith("error: --input: --track follows the objects of videos, and there is none")
    (pictures / "film.mp4").touch()
    monkeypatch.setitem(sys.modules, "trackers", None)
    status, _ = tool("predict", *arguments)
    assert "pip install trackers" in status and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_attention_sheets(tool, run_folder, pictures, tmp_path):
    weights = run_folder / "model_final.pth"
    arguments = ["--input", pictures / "one.png", "--output", tmp_path / "sheets"]
    status, printed = tool("visualize_attention", "--weights", weights, *arguments, "--queries", 0, 3, "--separate")
    assert status == 0 and "query 0" in printed
    names = {path.name for path in (tmp_path / "sheets").iterdir()}
    assert {"one-query0.png", "one-query3.png", "one-query0-layer1-head1.png"} <= names
    status, printed = tool("visualize_attention", "--weights", weights, *arguments, "--score-threshold", 0.99)
    assert status == 0 and "lower --score-threshold" in printed
    status, _ = tool("visualize_attention", "--weights", weights, *arguments, "--queries", 10**6)
    assert "queries are numbered from 0" in status
    (pictures / "broken.png").write_text("no image")
    status, printed = tool(
        "visualize_attention", "--weights", weights, "--input", pictures, *arguments[2:], "--queries", 1
    )
    assert status == 1 and "broken.png is not an image" in printed
    assert (tmp_path / "sheets" / "below" / "one-query1.png").exists()  # after the broken one


@pytest.mark.slow
def test_two_models_side_by_side(tool, run_folder, pictures, tmp_path):
    """The same model beside itself finds the same query."""
    weights = run_folder / "model_final.pth"
    arguments = ["--weights", weights, "--input", pictures / "one.png", "--score-threshold", 0, "--max-queries", 1]
    tool("visualize_attention", *arguments, "--output", tmp_path / "alone")
    _, printed = tool("visualize_attention", *arguments, "--output", tmp_path / "both", "--compare-weights", weights)
    first, second = printed.strip().splitlines()[-1].split(": ", 1)[1].split(" | ")
    assert first == second
    (alone,), (both,) = ((tmp_path / name).iterdir() for name in ("alone", "both"))
    assert Image.open(both).size[0] > 2 * Image.open(alone).size[0]


@pytest.mark.slow
def test_mistakes_in_the_second_model_name_its_options(tool, run_folder, pictures, tmp_path):
    weights = run_folder / "model_final.pth"
    arguments = ["--weights", weights, "--input", pictures / "one.png", "--output", tmp_path / "sheets"]
    status, _ = tool("visualize_attention", *arguments, "--compare-weights", tmp_path / "no.yaml")
    assert "error: --compare-weights: " in status and "no.yaml: there is no such file" in status
    torch.save({"model": {}}, tmp_path / "bare.pth")
    status, _ = tool("visualize_attention", *arguments, "--compare-weights", tmp_path / "bare.pth")
    assert "error: --compare-config-file: " in status and "bare.pth carries no config" in status


@pytest.mark.slow
def test_curves(tool, run_folder, tmp_path):
    output = tmp_path / "curves.svg"
    status, _ = tool("plot_metrics", "--input", run_folder, "--published", "r50_e12", "--output", output)
    assert status is None and "<svg" in output.read_text()
    status, _ = tool("plot_metrics", "--input", run_folder, "--output", tmp_path / "curves.txt")
    assert "ends in .png or .svg or .pdf" in status
    status, _ = tool("plot_metrics", "--input", run_folder, run_folder, "--output", output)
    assert "need different names" in status
    status, _ = tool("plot_metrics", "--input", tmp_path, "--output", output)
    assert "there is no such file" in status


@pytest.mark.slow
def test_training_images_are_drawn_with_denoising_queries(tool, run_folder, tmp_path):
    from visualize_data import draw, read_config

    from samdetr.data import build_train_loader

    assert (
        tool("visualize_data", "--weights", run_folder / "model_final.pth", "--output", tmp_path / "a.png")[0] is None
    )
    assert Image.open(tmp_path / "a.png").size[0] > 500
    config = str(ROOT / "configs" / "sam_detr_pp_digits.yaml")
    cfg = read_config(argparse.Namespace(config_file=config, weights=None, opts=["INPUT.MOSAIC.PROB", "1.0"]))
    batch = next(iter(build_train_loader(cfg)))[:2]
    figure = draw(batch, cfg)
    left, right = figure.axes[:2]
    boxes = len(batch[0]["instances"])
    assert boxes > 5  # of four images
    assert len(left.patches) == boxes and len(right.patches) == 2 * boxes
    status, _ = tool("visualize_data", "--output", tmp_path / "b.png")
    assert "Name --config-file, or --weights" in status


@pytest.mark.slow
def test_report(tool, run_folder, tmp_path):
    output = tmp_path / "report.html"
    status, _ = tool("report", "--input", run_folder, "--output", output, "--max-images", 6, "--num-examples", 2)
    assert status is None
    page = output.read_text()
    for text in ("Precision and recall", "Worst images", "Best images", "MODEL", "torch", "data:image/jpeg;base64"):
        assert text in page
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[1:7] == ["Precision and recall", "By class", "Score thresholds", "Confusion", "Errors", "Images"]
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # self-contained


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (480, 640), (96, 64)])
def test_export_is_checked_at_other_sizes(size):
    from samdetr.cli.export import other_sizes

    sizes = other_sizes(size, 0)
    assert len({size, *sizes}) == 4 and min(min(s) for s in sizes) >= 64


@pytest.mark.slow
def test_a_file_that_was_not_exported(tmp_path, pictures):
    import subprocess

    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools" / "run_exported.py"), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    output = ["--output", tmp_path / "out.png"]
    (tmp_path / "model.onnx").write_text("no model")
    for model, image, message in (
        ("model.onnx", pictures / "one.png", "is no file of tools/export_model.py"),
        ("model.pth", pictures / "one.png", "name a file of tools/export_model.py"),
        ("no.onnx", pictures / "one.png", "no.onnx: there is no such file"),
        ("model.onnx", tmp_path / "model.onnx", "is not an image"),
    ):
        result = run("--model", tmp_path / model, "--input", image, *output)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "visualize_attention"])
def test_wrong_weights_and_inputs_are_named(tool, run_folder, pictures, tmp_path, name):
    weights = run_folder / "model_final.pth"
    options = ["--output", tmp_path / "out"]
    status, _ = tool(name, "--weights", tmp_path / "no.pth", "--input", pictures, *options)
    assert "error: --weights: " in status and "no.pth: there is no such file" in status
    status, _ = tool(name, "--weights", weights, "--input", tmp_path / "nothing", *options)
    assert "error: --input: " in status and "nothing: there is no such file" in status
    (tmp_path / "empty").mkdir()
    status, _ = tool(name, "--weights", weights, "--input", tmp_path / "empty", *options)
    assert "empty: the folder holds no file" in status
    status, _ = tool(name, "--weights", weights, "--class-names", "a,b", "--input", pictures, *options)
    assert "error: --class-names: There are 2 class names for a model of 10 classes" in status
    status, _ = tool(name, "--weights", weights, "--device", "tpu9", "--input", pictures, *options)
    assert "error: --device: There is no device 'tpu9'" in status
    shutil.rmtree(tmp_path / "empty")
