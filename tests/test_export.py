"""samdetr.export: traced at one size, the graph gives the model's outputs at others."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from helpers import BEYOND, DN, MULTI_SCALE, ROOT, SMCA, tiny_config, tiny_model
from samdetr.cli.export import largest_difference, share_found
from samdetr.export import (
    ExportableModel,
    _nodes_below,
    describe,
    export,
    fit_size,
    onnx_to_openvino,
    trace,
)
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


OTHER_SIZES = ((1, (64, 64)), (2, (128, 96)), (3, (97, 161)))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_files_agree_at_other_sizes_and_batches(tmp_path, family):
    """All kinds of files, written from one tracing."""
    predictor = make_predictor(*FAMILIES[family])
    program = trace(predictor, size=(96, 128))
    for suffix in (".onnx", ".pt2"):
        export(predictor, program, tmp_path / f"model{suffix}")
    onnx_to_openvino(tmp_path / "model.onnx", tmp_path / "model.xml")
    for suffix in (".onnx", ".pt2", ".xml"):
        for batch, size in OTHER_SIZES:
            assert largest_difference(predictor, tmp_path / f"model{suffix}", size, batch) < 1e-4
    check_lower_precisions(predictor, tmp_path)


def check_lower_precisions(predictor, folder):
    """From model.onnx in a folder: half-precision weights halve the file, and 8 bits are in backbone and encoder alone."""
    import openvino

    random = [255 * torch.rand(batch, 3, *size) for batch, size in OTHER_SIZES]
    onnx_to_openvino(folder / "model.onnx", folder / "half.xml", "float16")
    size, half = ((folder / name).stat().st_size for name in ("model.bin", "half.bin"))
    assert half < 0.6 * size and share_found(predictor, folder / "half.xml", random) > 0.95
    pytest.importorskip("nncf", reason="needs: pip install nncf")
    calibration = [255 * torch.rand(1, 3, 96, 128).numpy() for _ in range(4)]
    onnx_to_openvino(folder / "model.onnx", folder / "int8.xml", "int8", calibration)
    assert (folder / "int8.bin").stat().st_size < half
    share_found(predictor, folder / "int8.xml", random)  # it runs at these sizes
    graph = openvino.Core().read_model(folder / "int8.xml")
    quantised = {
        target.get_node().get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for target in node.output(0).get_target_inputs()
    }
    exported = onnx.load(folder / "model.onnx")
    assert len(quantised & _nodes_below(exported, ["model.backbone"])) > 3
    assert quantised & _nodes_below(exported, ["model.encoder"])
    assert not quantised & _nodes_below(exported, ["model.decoder"])


@pytest.mark.slow
def test_a_network_of_timm_is_exported(tmp_path):
    """One that pads as TensorFlow does: with timm's own padding, tracing would take more than ten minutes."""
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0"]
    predictor = make_predictor(*SMCA, *ONE_LAYER, *backbone, "MODEL.SAMDETR.IN_FEATURES", ["stride16"])
    export(predictor, trace(predictor, size=(96, 128)), tmp_path / "model.onnx")
    assert largest_difference(predictor, tmp_path / "model.onnx", (97, 161), 2) < 1e-4


@pytest.mark.slow
def test_the_files_run_without_this_project(tmp_path, monkeypatch):
    """tools/run_exported.py imports neither detectron2 nor this project nor, for ONNX and OpenVINO, torch."""
    from PIL import Image

    predictor = make_predictor(*ONE_LAYER)
    program = trace(predictor, size=(64, 64))
    export(predictor, program, tmp_path / "model.onnx")
    # On the way to OpenVINO, torch would write the same ONNX file again, which takes long.
    again = SimpleNamespace(
        model=SimpleNamespace(metadata_props={}), save=lambda path: shutil.copy(tmp_path / "model.onnx", path)
    )
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: again)
    export(predictor, program, tmp_path / "model.xml")
    pixels = np.random.RandomState(0).randint(0, 255, (80, 100, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'detectron2', 'samdetr'])); import runpy; "
    tool = str(ROOT / "tools" / "run_exported.py")
    printed = []
    for model in ("model.onnx", "model.xml"):
        arguments = ["--model", model, "--input", "image.png", "--output", "out.png", "--score-threshold", "0.01"]
        code = f"{blocked}sys.argv = {[tool, *arguments]!r}; runpy.run_path({tool!r}, run_name='__main__')"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
        assert Image.open(tmp_path / "out.png").size == (100, 80)
    assert "name " in printed[0] and sorted(printed[0].splitlines()) == sorted(printed[1].splitlines())


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.onnx .*, \.xml .* or \.pt2"):
        export(make_predictor(), None, tmp_path / "model.engine")


def test_the_description_is_complete():
    description = describe(make_predictor())
    assert description["class_names"][3] == "name 3" and description["channel_order"] == "RGB"
    assert description["shortest_side"] == 128 and description["size_divisibility"] == 0


def test_images_are_resized_to_what_a_file_takes():
    description = {"size_divisibility": 0, "smallest_side": 64}
    images = 255 * torch.rand(1, 3, 70, 90)
    assert torch.equal(fit_size(images, description), images)
    assert fit_size(images[..., :30], description).shape == (1, 3, 70, 64)
    # Multiples of 32 that are nearest: 70 to 64, 90 to 96; of 48, 64 is at least 96.
    assert fit_size(images.byte(), {**description, "size_divisibility": 32}).shape == (1, 3, 64, 96)
    assert fit_size(images, {**description, "size_divisibility": 48}).shape == (1, 3, 96, 96)
