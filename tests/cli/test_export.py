"""samdetr export: what it asks for, and how it checks what was written. tests/test_export.py tests the files themselves."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

import samdetr
from helpers import tiny_config, tiny_model
from samdetr.cli import export as command
from samdetr.cli import main
from samdetr.predictor import Predictor


@pytest.fixture
def samdetr_export(monkeypatch, capsys, tmp_path):
    """Run the command on a tiny model, without tracing: the "file" gives what ``outputs(model's outputs)`` makes of them.

    Returns its exit status (or message), what it printed, and the arguments of the exports.
    """
    predictor = Predictor(tiny_config(), tiny_model())
    exports = []

    def export(predictor, program, path, precision, calibration):
        exports.append((path, precision, calibration))
        for suffix in (".xml", ".bin"):
            path.with_suffix(suffix).write_text("exported")

    def run(*arguments, outputs=lambda found: found):
        monkeypatch.setattr(command, "load_predictor", lambda arguments: predictor)
        monkeypatch.setattr(command, "trace", lambda predictor, size: None)
        monkeypatch.setattr(command, "find_spec", lambda package: True)
        monkeypatch.setattr(command, "export", export)
        monkeypatch.setattr(
            command,
            "open_exported",
            lambda path: lambda images: outputs(command.outputs_of(predictor, torch.from_numpy(images))),
        )
        with pytest.raises(SystemExit) as ended:
            main(["export", "--weights", "model.pth", "--size", "64", "96", *map(str, arguments)])
        return ended.value.code, capsys.readouterr().out, exports

    return run


def folder_of_images(folder, number):
    folder.mkdir()
    for i in range(number):
        pixels = np.random.RandomState(i).randint(0, 255, (100, 120 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_8_bits_are_calibrated_and_checked_on_different_images(samdetr_export, tmp_path):
    images = folder_of_images(tmp_path / "images", 10)
    output = tmp_path / "model.xml"
    arguments = ["--output", output, "--precision", "int8", "--calibration", images]
    status, printed, [(_, precision, calibration)] = samdetr_export(*arguments)
    assert status is None and "100.0 % of the model's ten best" in printed
    assert precision == "int8" and len(calibration) == 8  # a fifth is for the check
    assert all(len(x) == 1 and x.dtype == np.float32 and max(x.shape[2:]) == 128 for x in calibration)
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model.bin", "model.xml"]


def test_8_bits_are_calibrated_on_the_training_dataset(shapes_dataset):
    predictor = Predictor(tiny_config("DATASETS.TRAIN", (shapes_dataset, shapes_dataset)), tiny_model())
    images = command.read_calibration(predictor, None)
    assert len(images) == 12 and {len(image) for image in images} == {1}
    again = command.read_calibration(predictor, None)
    assert all(torch.equal(first, second) for first, second in zip(images, again))


def test_a_file_that_finds_too_little_is_kept_under_another_name(samdetr_export, tmp_path):
    def other_classes(found):
        return {**found, "classes": (found["classes"] + 1) % 10, "scores": found["scores"] - 0.2}

    arguments = ["--output", tmp_path / "model.xml", "--precision", "float16"]
    status, printed, _ = samdetr_export(*arguments, outputs=other_classes)
    assert "0.0 % of" in printed and "finds less than 95 % of the model's best detections" in status
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.unchecked.bin", "model.unchecked.xml"]


def test_outputs_in_float32_are_compared_as_numbers(samdetr_export, tmp_path):
    def nearly(found):
        return {**found, "scores": found["scores"] + np.float32(2e-4)}

    arguments = ["--output", tmp_path / "model.xml"]
    status, _, _ = samdetr_export(*arguments, outputs=nearly)
    assert "differs from the model by more than 1e-04" in status
    status, printed, _ = samdetr_export(*arguments)
    assert status is None and printed.count("largest difference") == 3


def test_mistakes(samdetr_export, tmp_path, monkeypatch):
    few = folder_of_images(tmp_path / "few", 9)
    output = ["--output", tmp_path / "model.xml"]
    (tmp_path / "old.bin").write_text("weights of another model")
    for arguments, message in (
        (["--output", tmp_path / "model.trt"], "ends in .onnx or .xml or .pt2"),
        (["--output", tmp_path / "old.xml"], "old.bin exists already"),
        (["--output", tmp_path / "model.onnx", "--precision", "float16"], "float16 is for OpenVINO"),
        ([*output, "--calibration", few], "--calibration is for --precision int8"),
        ([*output, "--precision", "int8", "--calibration", few], "error: --calibration: There are 9 images"),
        ([*output, "--precision", "int8", "--calibration", tmp_path / "no"], "no: there is no such file"),
    ):
        status, _, exports = samdetr_export(*arguments)
        assert message in status and not exports


def test_the_packages_that_are_missing_are_named(monkeypatch, tmp_path, capsys):
    for name in ("openvino", "nncf"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(command, "find_spec", lambda package: None if package in ("openvino", "nncf") else True)
    with pytest.raises(SystemExit) as ended:
        main(["export", "--weights", "a.pth", "--output", str(tmp_path / "a.xml"), "--precision", "int8"])
    assert "needs: pip install openvino nncf" in ended.value.code
    with pytest.raises(samdetr.UserError, match="pip install openvino"):
        samdetr.export.onnx_to_openvino("a.onnx", tmp_path / "a.xml")


@pytest.mark.parametrize(
    ("suffix", "arguments", "message"),
    [
        (".xml", ["fp32"], "precision is 'fp32': choose from float32, float16, int8"),
        (".xml", ["int8"], "int8 needs images"),
        (".onnx", ["float16"], r"model\.onnx cannot be in float16: only files of OpenVINO"),
    ],
)
def test_precisions_that_there_are_not(suffix, arguments, message, tmp_path):
    with pytest.raises(samdetr.UserError, match=message):
        samdetr.export.export(None, None, tmp_path / f"model{suffix}", *arguments)


def test_the_share_is_of_the_ten_best_wherever_the_file_ranks_them(monkeypatch):
    corners = np.stack([np.array([i / 12, 0.1, (i + 1) / 12, 0.5]) for i in range(12)])[None].astype(np.float32)
    expected = {"boxes": corners, "scores": np.linspace(0.9, 0.35, 12)[None], "classes": np.arange(12)[None]}
    monkeypatch.setattr(command, "outputs_of", lambda predictor, images: expected)

    def share(**changed):
        return command.share_found(None, lambda images: {**expected, **changed}, [torch.zeros(1, 3, 64, 64)])

    assert share() == 1
    assert share(**{name: values[:, ::-1].copy() for name, values in expected.items()}) == 1
    assert share(scores=expected["scores"] + 0.11) == 0
    lower = corners.copy()
    lower[0, :4, 3] = 0.35  # IoU 0.625
    lower[0, 4:6, 3] = 0.42  # IoU 0.8
    assert share(boxes=lower) == pytest.approx(0.6)
    other = expected["classes"].copy()
    other[0, [1, 10, 11]] = 9  # the last two are not among the ten best
    assert share(classes=other) == pytest.approx(0.9)
