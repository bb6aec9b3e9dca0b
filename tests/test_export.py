"""samdetr.export: traced at one size, the graph gives the model's outputs at others."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import BEYOND, DN, MULTI_SCALE, ROOT, SMCA, tiny_config, tiny_model
from samdetr.cli.export import largest_difference
from samdetr.export import ExportableModel, describe, export, trace
from samdetr.predictor import Predictor

ONE_LAYER = ["MODEL.SAMDETR.DECODER.NUM_LAYERS", 1]  # the graph's size decides how long exporting takes


TWO_LEVELS = [
    *("MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"], "MODEL.SAMDETR.IN_FEATURES", ["res4", "res5"]),
    *("MODEL.SAMDETR.DECODER.NUM_LAYERS", 2),  # one per level
]
FAMILIES = {"single-scale": [*SMCA, *ONE_LAYER], "multi-scale": [*SMCA, *MULTI_SCALE, *DN, *BEYOND, *TWO_LEVELS]}


def make_predictor(*options):
    return Predictor(tiny_config(*options), tiny_model(*options), class_names=[f"name {i}" for i in range(10)])


def test_the_exportable_model_is_the_model():
    predictor = make_predictor()
    images = 255 * torch.rand(2, 3, 64, 96)
    boxes, scores, classes = ExportableModel(predictor.model)(images)
    outputs = predictor.model([{"image": image, "height": 64, "width": 96} for image in images])
    for i, output in enumerate(outputs):
        instances = output["instances"]
        corners = boxes[i].clip(0, 1) * torch.tensor([96, 64, 96, 64])
        kept = ((corners[:, 2:] - corners[:, :2]) > 0).all(1)  # detectron2 drops what lies outside
        assert torch.allclose(instances.pred_boxes.tensor, corners[kept], atol=1e-3)
        assert torch.allclose(instances.scores, scores[i, kept])
        assert torch.equal(instances.pred_classes, classes[i, kept])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_files_agree_at_other_sizes_and_batches(tmp_path, family):
    """Both kinds of files, written from one tracing."""
    predictor = make_predictor(*FAMILIES[family])
    program = trace(predictor, size=(96, 128))
    for suffix in (".onnx", ".pt2"):
        path = tmp_path / f"model{suffix}"
        export(predictor, program, path)
        for batch, size in ((1, (64, 64)), (2, (128, 96)), (3, (97, 161))):
            assert largest_difference(predictor, path, size, batch) < 1e-4


@pytest.mark.slow
def test_a_network_of_timm_is_exported(tmp_path):
    """One that pads as TensorFlow does: with timm's own padding, tracing would take more than ten minutes."""
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0"]
    predictor = make_predictor(*SMCA, *ONE_LAYER, *backbone, "MODEL.SAMDETR.IN_FEATURES", ["stride16"])
    export(predictor, trace(predictor, size=(96, 128)), tmp_path / "model.onnx")
    assert largest_difference(predictor, tmp_path / "model.onnx", (97, 161), 2) < 1e-4


@pytest.mark.slow
def test_the_file_runs_without_this_project(tmp_path):
    """tools/run_exported.py imports neither detectron2 nor this project nor, for ONNX, torch."""
    from PIL import Image

    predictor = make_predictor(*ONE_LAYER)
    export(predictor, trace(predictor, size=(64, 64)), tmp_path / "model.onnx")
    pixels = np.random.RandomState(0).randint(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'detectron2', 'samdetr'])); import runpy; "
    tool = str(ROOT / "tools" / "run_exported.py")
    arguments = ["--model", "model.onnx", "--input", "image.png", "--output", "out.png", "--score-threshold", "0.01"]
    code = f"{blocked}sys.argv = {[tool, *arguments]!r}; runpy.run_path({tool!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "name " in result.stdout and Image.open(tmp_path / "out.png").size == (100, 80)


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.onnx .* or \.pt2"):
        export(make_predictor(), None, tmp_path / "model.engine")


def test_the_description_is_complete():
    description = describe(make_predictor())
    assert description["class_names"][3] == "name 3" and description["channel_order"] == "RGB"
    assert description["shortest_side"] == 128 and description["size_divisibility"] == 0
