"""The tools that use a trained model, with the checkpoint of a short run."""

import argparse
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT


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


@pytest.mark.slow
def test_predictions_of_a_dataset_can_be_evaluated(tool, run_folder, tmp_path):
    """Files named by numbers keep them, so that pycocotools matches predictions and ground truth."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets.coco import convert_to_coco_dict
    from pycocotools.coco import COCO

    import samdetr  # noqa: F401, registers the dataset

    records = DatasetCatalog.get("digits_val")[:4]
    truth = COCO()
    truth.dataset = convert_to_coco_dict("digits_val")
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
    status, printed = tool(
        *("predict", "--weights", run_folder / "model_final.pth", "--output", tmp_path / "out", "--score-threshold", 0),
        *("--input", tmp_path / "broken.mp4", tmp_path / "film.mp4"),
    )
    assert status == 1 and "broken.mp4 is not a video" in printed
    capture = cv2.VideoCapture(str(tmp_path / "out" / "film.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 5 and capture.get(cv2.CAP_PROP_FPS) == 10
    detections = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert {d["frame"] for d in detections} == set(range(5))


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
    cfg = read_config(argparse.Namespace(config_file=config, weights=None, opts=[]))
    batch = next(iter(build_train_loader(cfg)))[:2]
    figure = draw(batch, cfg)
    left, right = figure.axes[:2]
    boxes = len(batch[0]["instances"])
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
    assert 'src="http' not in page and "href" not in page  # self-contained


@pytest.mark.slow
def test_export_checks_what_it_writes(tool, run_folder, tmp_path):
    weights, path = run_folder / "model_final.pth", tmp_path / "model.ONNX"
    status, printed = tool("export_model", "--weights", weights, "--output", path, "--size", 64, 96)
    assert status is None and path.exists() and printed.count("largest difference") == 3
    assert not list(tmp_path.glob("*unchecked*"))
    status, _ = tool("export_model", "--weights", weights, "--output", path)
    assert "exists already" in status
    status, _ = tool("export_model", "--weights", weights, "--output", tmp_path / "b.pt2", "--size", 32, 32)
    assert "at least 64 pixels" in status


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (480, 640), (96, 64)])
def test_export_is_checked_at_other_sizes(size):
    from export_model import other_sizes

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
    assert "error: --input: " in status and "nothing: there is no such file or folder" in status
    (tmp_path / "empty").mkdir()
    status, _ = tool(name, "--weights", weights, "--input", tmp_path / "empty", *options)
    assert "empty: the folder holds no file" in status
    status, _ = tool(name, "--weights", weights, "--class-names", "a,b", "--input", pictures, *options)
    assert "error: --class-names: There are 2 class names for a model of 10 classes" in status
    status, _ = tool(name, "--weights", weights, "--device", "tpu9", "--input", pictures, *options)
    assert "error: --device: There is no device 'tpu9'" in status
    shutil.rmtree(tmp_path / "empty")
