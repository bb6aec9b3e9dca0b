"""samdetr.export: traced at one size, the graph gives the model's outputs at others."""

import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
from PIL import Image

from helpers import BEYOND, CONTRASTIVE, ROOT, SMCA, TWO_LEVELS, tiny_config, tiny_model
from samdetr.cli.export import largest_difference, share_found
from samdetr.export import (
    ExportableModel,
    _nodes_below,
    describe,
    export,
    fit_size,
    onnx_to_openvino,
    open_exported,
    trace,
)
from samdetr.predictor import Predictor

ONE_LAYER = ["MODEL.SAMDETR.DECODER.NUM_LAYERS", 1]  # the graph's size decides how long exporting takes


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


@pytest.mark.thorough
def test_a_network_of_timm_is_traced(tmp_path):
    """One that pads as TensorFlow does: with timm's own padding, this would take more than ten minutes."""
    backbone = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0"]
    predictor = make_predictor(*SMCA, *ONE_LAYER, *backbone, "MODEL.SAMDETR.IN_FEATURES", ["stride16"])
    export(predictor, trace(predictor, size=(96, 128)), tmp_path / "model.pt2")
    assert largest_difference(predictor, open_exported(tmp_path / "model.pt2"), (97, 161), 2) < 1e-4


@pytest.mark.slow
@pytest.mark.thorough
def test_the_command_writes_every_kind_of_file_and_checks_it(tool, pictures, tmp_path, monkeypatch):
    """Of a model with all parts, from one tracing and one file of ONNX, since each takes long. They run alone."""
    predictor = make_predictor(*SMCA, *TWO_LEVELS, *CONTRASTIVE, *BEYOND)
    data = {"model": predictor.model.state_dict(), "class_names": predictor.class_names}
    torch.save({**data, "config": predictor.cfg.dump()}, tmp_path / "one.pth")
    weights = ["--weights", tmp_path / "one.pth"]
    first_trace = functools.cache(trace)
    onnx_file = tmp_path / "model.ONNX"
    written = SimpleNamespace(model=SimpleNamespace(metadata_props={}), save=lambda path: shutil.copy(onnx_file, path))
    monkeypatch.setattr("samdetr.cli.export.trace", lambda _, size: first_trace(predictor, size))
    for suffix in ("ONNX", "xml", "pt2"):
        path = tmp_path / f"model.{suffix}"
        status, printed = tool("export_model", *weights, "--output", path, "--size", 96, 128)
        assert status is None and path.exists()
        assert printed.count("largest difference") == 3  # at other sizes than the traced one, in batches of 1 to 3
        if suffix == "ONNX":
            monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: written)
    assert first_trace.cache_info().misses == 1
    assert not list(tmp_path.glob("*unchecked*"))
    status, _ = tool("export_model", *weights, "--output", path)
    assert "exists already" in status
    monkeypatch.undo()
    status, _ = tool("export_model", *weights, "--output", tmp_path / "b.pt2", "--size", 32, 32)
    assert "at least 64 pixels" in status
    check_they_run_alone([onnx_file, tmp_path / "model.xml"], pictures / "one.png", tmp_path)
    check_lower_precisions(predictor, onnx_file, tmp_path)


def check_they_run_alone(files, image, folder):
    """tools/run_exported.py imports neither detectron2 nor this project nor, for ONNX and OpenVINO, torch."""
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torch', 'detectron2', 'samdetr'])); import runpy; "
    script = str(ROOT / "tools" / "run_exported.py")
    printed = []
    for file in files:
        arguments = ["--model", str(file), "--input", str(image), "--output", "out.png", "--score-threshold", "0.01"]
        code = f"{blocked}sys.argv = {[script, *arguments]!r}; runpy.run_path({script!r}, run_name='__main__')"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
        assert Image.open(folder / "out.png").size == Image.open(image).size
    assert "name " in printed[0] and sorted(printed[0].splitlines()) == sorted(printed[1].splitlines())


def check_lower_precisions(predictor, source, folder):
    """From a file of ONNX: half-precision weights halve the file, and 8 bits are in backbone and encoder alone."""
    import openvino

    random = [255 * torch.rand(batch, 3, *size) for batch, size in ((1, (64, 64)), (2, (128, 96)), (3, (97, 161)))]
    onnx_to_openvino(source, folder / "half.xml", "float16")
    size, half = ((folder / name).stat().st_size for name in ("model.bin", "half.bin"))
    assert half < 0.6 * size and share_found(predictor, open_exported(folder / "half.xml"), random) > 0.95
    pytest.importorskip("nncf", reason="needs: pip install nncf")
    calibration = [255 * torch.rand(1, 3, 96, 128).numpy() for _ in range(4)]
    onnx_to_openvino(source, folder / "int8.xml", "int8", calibration)
    assert (folder / "int8.bin").stat().st_size < half
    share_found(predictor, open_exported(folder / "int8.xml"), random)  # it runs at these sizes
    graph = openvino.Core().read_model(folder / "int8.xml")
    quantised = {
        target.get_node().get_friendly_name()
        for node in graph.get_ops()
        if node.get_type_name() == "FakeQuantize"
        for target in node.output(0).get_target_inputs()
    }
    exported = onnx.load(source)
    assert len(quantised & _nodes_below(exported, ["model.backbone"])) > 3
    assert quantised & _nodes_below(exported, ["model.encoder"])
    for part in ("model.decoder", "model.query_generator"):
        assert _nodes_below(exported, [part]) and not quantised & _nodes_below(exported, [part])


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.onnx .*, \.xml .* or \.pt2"):
        export(make_predictor(), None, tmp_path / "model.engine")


def test_the_description_is_complete():
    description = describe(make_predictor())
    assert description["class_names"][3] == "name 3" and description["channel_order"] == "RGB"
    assert description["shortest_side"] == 128 and description["size_divisibility"] == 0


@pytest.mark.parametrize(("divisor", "smallest"), [(0, 64), (32, 64), (48, 96), (64, 128)])
def test_the_smallest_side_is_the_tracers(divisor, smallest):
    predictor = make_predictor()
    predictor.model = SimpleNamespace(backbone=SimpleNamespace(size_divisibility=divisor))
    assert describe(predictor)["smallest_side"] == smallest


def test_images_are_resized_to_what_a_file_takes():
    description = {"size_divisibility": 0, "smallest_side": 64}
    images = 255 * torch.rand(1, 3, 70, 90)
    assert torch.equal(fit_size(images, description), images)
    assert fit_size(images[..., :30], description).shape == (1, 3, 70, 64)
    # Multiples of 32 that are nearest: 70 to 64, 90 to 96; of 48, 64 is at least 96.
    assert fit_size(images.byte(), {**description, "size_divisibility": 32}).shape == (1, 3, 64, 96)
    assert fit_size(images, {**description, "size_divisibility": 48}).shape == (1, 3, 96, 96)
