"""The scripts in tools/, run as a user runs them."""

import argparse
import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_config, make_input, subprocess_environment, tiny_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from PIL import Image
from test_checkpoint import converted_model, published_state_dict

import samdetr
from samdetr.checkpoint import CheckedCheckpointer

sys.path.insert(0, str(ROOT / "tools"))


def run_tool(name, *arguments):
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), timeout=300)


def published_file(path, name, **extra):
    torch.save({"model": published_state_dict(name), **extra}, path)
    return path


@pytest.mark.slow
def test_converted_checkpoint_loads_in_detectron2_and_predicts_the_same(tmp_path):
    source = published_file(tmp_path / "ms_smca_e12.pth", "r50_ms_smca_12ep", epoch=11)
    result = run_tool("convert_checkpoint.py", source, tmp_path / "ours.pth")
    assert result.returncode == 0, result.stderr
    assert "fits configs/sam_detr_pp_smca_R_50_1x.yaml" in result.stdout
    model = build_model(load_config("sam_detr_pp_smca_R_50_1x")).eval()
    DetectionCheckpointer(model).load(str(tmp_path / "ours.pth"))
    inputs = [make_input(64, 96)]
    expected = converted_model("r50_ms_smca_12ep").predict(inputs)
    assert torch.equal(model.predict(inputs)["pred_logits"], expected["pred_logits"])
    predictor = samdetr.load(tmp_path / "ours.pth", device="cpu")  # needs no config and no class names
    assert torch.equal(predictor.model.predict(inputs)["pred_logits"], expected["pred_logits"])
    assert predictor.class_names[0] == "person" and predictor.category_ids[-1] == 90


@pytest.mark.slow
def test_checkpoints_with_objects_need_a_flag(tmp_path):
    arguments = argparse.Namespace(dilation=True)
    source = published_file(tmp_path / "r50.pth", "r50_dc5_smca_12ep", args=arguments)
    refused = run_tool("convert_checkpoint.py", source, tmp_path / "ours.pth")
    assert refused.returncode == 1 and not (tmp_path / "ours.pth").exists()
    assert "argparse.Namespace" in refused.stderr and "--allow-pickle" in refused.stderr
    allowed = run_tool("convert_checkpoint.py", source, tmp_path / "ours.pth", "--allow-pickle")
    assert allowed.returncode == 0, allowed.stderr
    assert "fits configs/sam_detr_smca_R_50_DC5_1x.yaml" in allowed.stdout
    again = run_tool("convert_checkpoint.py", source, tmp_path / "ours.pth", "--allow-pickle")
    assert again.returncode == 1 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("name", "file_name", "extra", "expected"),
    [
        ("r50_12ep", "r50.pth", {}, "sam_detr_R_50_1x"),
        ("r50_50ep", "r50.pth", {}, "sam_detr_R_50_50ep"),
        ("r50_smca_12ep", "r50_dc5_smca.pth", {}, "sam_detr_smca_R_50_DC5_1x"),
        ("r50_ms_12ep", "r50_ms.pth", {"epoch": 49}, "sam_detr_pp_R_50_50ep"),
        ("r50_ms_smca_12ep", "r50_ms_smca_e50.pth", {}, "sam_detr_pp_smca_R_50_50ep"),
    ],
)
def test_variants_are_recognised(name, file_name, extra, expected):
    from convert_checkpoint import recognise

    assert recognise(published_state_dict(name), extra, file_name)[0] == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        ("text", "truncated, damaged or not a checkpoint"),
        ({"model": {"transformer.encoder.foo": torch.zeros(1)}}, "1 of 1 parameters are not those of a published"),
        ({"model": {"query_embed.weight": torch.zeros(300, 4)}}, "lacks the parameter"),
        ([1, 2], "holds a list"),
    ],
)
def test_other_files_are_refused_with_the_reason(content, message, tmp_path):
    from convert_checkpoint import convert

    from samdetr.errors import UserError

    source = tmp_path / "source.pth"
    if isinstance(content, str):
        source.write_text(content)
    elif content is not None:
        torch.save(content, source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "target.pth", 80, allow_pickle=False)
    assert not (tmp_path / "target.pth").exists()


def test_another_class_count_starts_anew_and_says_so(tmp_path, caplog):
    options = ["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator", "MODEL.SAMDETR.NUM_CLASSES"]
    trained, model = build_model(tiny_config(*options, 10)), build_model(tiny_config(*options, 3))
    path = tmp_path / "ten.pth"
    torch.save({"model": trained.state_dict()}, path)
    before = model.decoder.class_heads[0].weight.clone()
    CheckedCheckpointer(model, complete=False).load(str(path))
    assert "another number of classes" in caplog.text
    assert "decoder.class_heads.2.weight" in caplog.text and "label_embedding.weight start anew" in caplog.text
    assert torch.equal(model.decoder.class_heads[0].weight, before)
    assert torch.equal(model.decoder.box_heads[0].layers[0].weight, trained.decoder.box_heads[0].layers[0].weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "gflops"), [("sam_detr_R_50_1x", 95), ("sam_detr_R_50_DC5_1x", 182), ("sam_detr_pp_R_50_1x", 197)]
)
def test_gflops_are_the_published_codes(config, gflops):
    """At 800 x 1066, without what the published code's count leaves out, and with what it computes on top.

    It leaves out RoIAlign, a compiled op there, and in dense encoders the product of queries and keys: given a padding
    mask, torch's attention computes it by baddbmm, which fvcore does not know. It reduces the channels of 49 pooled cells
    for each query; here those of the map's pixels are reduced.
    """
    from analyze_model import count_flops

    cfg = load_config(config)
    counts = count_flops(build_model(cfg).eval(), 800, 1066)
    dense = cfg.MODEL.SAMDETR.ENCODER.NAME == "TransformerEncoder"
    strides = ([16] if "DC5" in config else [32]) if dense else [8, 16, 32]
    pixels = [-(-800 // stride) * -(-1066 // stride) for stride in strides]  # each level serves 6 / 1 or 6 / 3 layers
    reductions = 6 * 300 * 49 - 6 // len(pixels) * sum(pixels)
    known_to_fvcore = counts["total"] - counts["roi_align"] + reductions * 256 * 64
    if dense:
        known_to_fvcore -= 6 * pixels[0] ** 2 * 256
    assert known_to_fvcore / 1e9 == pytest.approx(gflops, rel=0.01)


def test_flops_are_counted_once_and_by_hand():
    from analyze_model import DECODER_PARTS, PARTS, count_flops

    model = build_model(tiny_config()).eval()
    counts = count_flops(model, 64, 64)
    assert sum(counts[part] for part in PARTS) == counts["total"]
    assert sum(counts[f"decoder.{part}"] for part in DECODER_PARTS) == pytest.approx(counts["decoder"], rel=0.01)
    # Class heads: 3 layers, 12 queries, 32 to 10; box heads: 32 to 32 to 32 to 4.
    assert counts["decoder.class_heads"] == 3 * 12 * 32 * 10
    assert counts["decoder.box_heads"] == 3 * 12 * (32 * 32 * 2 + 32 * 4)
    # 8 x 8 features. Rows, then columns of 7 x 7 bins of 8 channels; 4 heads' weights along both axes; their samples.
    assert counts["roi_align"] == 3 * 12 * (7 * 8 * 8 * 8 + 7 * 7 * 8 * 8 + 2 * 4 * 7 * 8 + 4 * 8 * 8 * 32)


def test_rows_of_the_papers_table_and_their_configs():
    from analyze_model import config_of_row

    rows = list(csv.DictReader((ROOT / "docs" / "published_results.csv").read_text().splitlines()))
    configs = {(row["method"], row["backbone"]): config_of_row(row) for row in rows}
    without = {method for (method, _), config in configs.items() if config is None}
    assert without == {"Anchor-DETR-R50-DC5", "Sparse-R-CNN-R50-FPN"}
    found = [config for config in configs.values() if config is not None]
    assert len(found) == len(set(found)) == 26
    for (_, backbone), config in configs.items():
        if config is not None:
            assert ("_DC5_" in config.stem) == (backbone == "R50-DC5")
            assert ("_pp_" in config.stem or "_FPN_" in config.stem) == (backbone == "R50-MS")
    documented = (ROOT / "docs" / "results.md").read_text()
    assert all(f"`{config.relative_to(ROOT / 'configs').with_suffix('')}`" in documented for config in found)


def test_a_wrong_table_is_refused_in_words(tmp_path):
    result = run_tool("analyze_model.py", "--published", tmp_path / "nothing.csv")
    assert result.returncode == 1 and "nothing.csv is not the paper's table" in result.stderr
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    result = run_tool("analyze_model.py", "--published", tmp_path / "other.csv")
    assert result.returncode == 1 and "other.csv is not the paper's table ('method')" in result.stderr


@pytest.mark.slow
def test_analysis_prints_the_papers_row():
    result = run_tool("analyze_model.py", "--config-file", ROOT / "configs" / "sam_detr_R_50_1x.yaml", "--size", 64, 96)
    assert result.returncode == 0, result.stderr
    assert "64 x 96" in result.stdout
    rows = {line.split("  ")[0]: line.split() for line in result.stdout.splitlines()}
    assert rows["the paper's Table 1"][-2:] == ["57", "107"]
    assert rows["total"][-2] == "58.06"


@pytest.mark.slow
def test_the_demo_from_start_to_picture(tmp_path):
    """With a model of seconds; the real demo's AP is in the README."""
    quick = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "MODEL.SAMDETR.HIDDEN_DIM", 32, "DATALOADER.NUM_WORKERS", 0]
    for attempt in range(2):
        result = run_tool("demo.py", "--output", tmp_path / "demo", *quick)
        assert result.returncode == 0, result.stderr[-3000:]
        assert "Box AP on digits_val: " in result.stdout and "predictions.png" in result.stdout
        assert (tmp_path / "demo" / "predictions.png").stat().st_size > 10000
        lines = (tmp_path / "demo" / "metrics.json").read_text().splitlines()
        assert any("bbox/AP" in json.loads(line) for line in lines)
        assert len(list(tmp_path.glob("demo-until-*"))) == attempt  # the first one is kept


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


def test_a_good_dataset_passes(shapes_root):
    result = run_tool("check_dataset.py", shapes_root / "annotations.json", shapes_root)
    assert result.returncode == 0, result.stdout
    assert "6 images, 6 boxes, 2 classes" in result.stdout and "Set MODEL.SAMDETR.NUM_CLASSES 2." in result.stdout
    assert "warning: images without boxes: 2 (3.png, 6.png)" in result.stdout and "ERROR" not in result.stdout


@pytest.mark.parametrize(
    ("change", "fatal", "message"),
    [
        ({"annotations": [box_entry(1, [1, 1, 5, 5], category_id=7)]}, True, "annotations of an unknown category: 1"),
        (
            {"annotations": [box_entry(1, [1, 1, 5, 5]), box_entry(1, [2, 2, 5, 5])]},
            True,
            "annotation ids duplicated: 1",
        ),
        ({"annotations": [box_entry(1, [1, 1, 5])]}, True, "annotations without a usable box: 1"),
        ({"annotations": [box_entry(1, [1, 1, 0, 5])]}, False, "boxes of width or height zero or less: 1 (1.png"),
        ({"annotations": [box_entry(1, [50, 1, 5, 5])]}, False, "boxes outside their image: 1"),
        ({"annotations": [box_entry(1, [20, 10, 38, 29])]}, False, "boxes look like corners"),
        ({"annotations": [box_entry(1, [0.1, 0.1, 0.5, 0.5])]}, False, "boxes look normalised"),
        ({"annotations": [box_entry(1, [1, 1, 5, 5], image_id=9)]}, False, "annotations of an unknown image: 1"),
        ({"annotations": [box_entry(1, [1, None, "5", 5])]}, True, "annotations without a usable box: 1"),
        ({"annotations": []}, True, "datasets without boxes"),
        ({"images": []}, True, "datasets without images"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]}, True, "annotations without an id"),
        (
            {"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}]},
            True,
            "annotations without an area or iscrowd, which the evaluation needs: 1",
        ),
        ({"categories": [{"id": 1}]}, True, "categories without a name: 1 (1)"),
        ({"images": [image_entry(1), image_entry(1)]}, True, "image ids duplicated: 1 (1)"),
        ({"images": [image_entry(1, width=50)]}, True, "another size than the annotation file says: 1"),
        ({"images": [image_entry(1, width=None)]}, True, "images without a file_name, width or height: 1"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, True, "category ids duplicated: 1"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}, False, "classes without a box: 1 (b)"),
    ],
)
def test_what_is_wrong_with_a_dataset_is_said(change, fatal, message, tmp_path):
    from check_dataset import check_dataset

    content = {"images": [image_entry(1)], "annotations": [box_entry(1, [1, 1, 5, 5])], **change}
    _, report = check_dataset(dataset_of(tmp_path, **content), tmp_path)
    assert any(message in line and line.startswith("ERROR" if fatal else "warning") for line in report.lines())
    assert report.fatal == fatal, report.lines()


def test_damaged_images_are_named_and_end_with_an_error(tmp_path):
    json_file = dataset_of(tmp_path, [image_entry(i) for i in range(1, 4)], [box_entry(1, [1, 1, 5, 5])])
    (tmp_path / "1.png").unlink()
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3.png").write_text("no image")
    result = run_tool("check_dataset.py", json_file, tmp_path)
    assert result.returncode == 1
    assert "ERROR: images missing: 1" in result.stdout and "1.png" in result.stdout
    assert "ERROR: images truncated: 1" in result.stdout and "2.png" in result.stdout
    assert "ERROR: images unreadable: 1" in result.stdout and "3.png" in result.stdout
    assert run_tool("check_dataset.py", json_file, tmp_path, "--no-images").returncode == 0


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("{}", 'has no list "images"')])
def test_files_that_are_no_datasets(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content)
    result = run_tool("check_dataset.py", tmp_path / "data.json", tmp_path)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_analysis_averages_over_a_datasets_images():
    config = ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml"
    mean = run_tool("analyze_model.py", "--config-file", config, "--num-images", 3)
    single = run_tool("analyze_model.py", "--config-file", config, "--size", 64, 64)
    assert mean.returncode == single.returncode == 0, mean.stderr
    assert "mean over 3 images" in mean.stdout
    assert mean.stdout.splitlines()[:-1] == single.stdout.splitlines()[:-1]  # they are all of 64 x 64


@pytest.mark.slow
def test_benchmark_compares_variants(tmp_path):
    config = ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml"
    variants = ["--variant", "plain", "--variant", "half SOLVER.AMP.ENABLED True"]
    variants += ["--variant", f"same checkout={ROOT} size=96x64 batch=1"]
    few = ["--task", "train", "inference", "--rounds", 1, "--steps", 2, "--warmup", 1, "--size", 64, 64, "--breakdown"]
    result = run_tool("benchmark.py", "--config-file", config, *variants, *few, "--output", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    found = {(r["task"], r["name"]): r for r in report["results"]}
    assert set(found) == {(task, name) for task in ("train", "inference") for name in ("plain", "half", "same")}
    assert found["train", "same"]["size"] == [96, 64] and found["train", "same"]["batch"] == 1
    for (task, _), r in found.items():
        # Profiling slows a step of a few milliseconds down, but every part must have been seen.
        assert r["seconds"] > 0 and sum(r["breakdown"].values()) > r["seconds"] / 2
        parts = {"backbone", "encoder", "decoder: aligner", "decoder: cross_attention"}
        parts |= {"matcher", "loss", "optimizer"} if task == "train" else {"post-processing"}
        assert parts <= set(r["breakdown"])
    rows = [line.split("|") for line in result.stdout.splitlines() if line.startswith("| train")]
    assert [row[2].strip() for row in rows] == ["plain", "half", "same"] and rows[0][5].strip() == "1.00"


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("x SOLVER.NOTHING 1", "no config key SOLVER.NOTHING"),
        ("x checkout=/nowhere", "/nowhere is not a checkout of this project"),
        ("x size=480", "'size=480' is not understood"),
        ("x config=nothing.yaml", "nothing.yaml: there is no such file"),
        ("y", "The variants need different names: y, y"),
    ],
)
def test_benchmark_refuses_a_wrong_variant(variant, message):
    config = ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml"
    wrong = run_tool("benchmark.py", "--config-file", config, "--variant", variant, "--variant", "y")
    assert wrong.returncode == 1 and message in wrong.stderr and "Traceback" not in wrong.stderr


def test_benchmark_reads_the_model_zoo():
    from benchmark import read_config

    assert read_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", []).MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


@pytest.mark.slow
def test_padding_is_measured(tmp_path):
    torch.save({"model": build_model(tiny_config()).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(tiny_config().dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--weights", tmp_path / "model.pth"]
    result = run_tool("measure_padding.py", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[0].startswith("1 a batch: AP ")
    assert result.stdout.splitlines()[1].startswith("8 a batch: AP ")


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    config = ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml"
    values = ["--sizes", 64, 70, 96, "--queries", 5, 10, "--boxes-an-image", 1, "--batches", 1]
    output = ["--output", tmp_path / "growth.json", "--plot", tmp_path / "growth.png"]
    result = run_tool("measure_growth.py", "--config-file", config, "--size", 64, 64, "--steps", 1, *values, *output)
    assert result.returncode == 0, result.stderr
    results = {r["name"]: r for r in json.loads((tmp_path / "growth.json").read_text())["results"]}
    assert set(results) == {"image-side-64", "image-side-96", "queries-5", "queries-10", "boxes-1", "batch-1"}
    assert results["queries-10"]["multiply_adds"] > results["queries-5"]["multiply_adds"]
    assert results["queries-5"]["multiply_adds"] == 2 * results["batch-1"]["multiply_adds"] * (
        results["queries-5"]["multiply_adds"] / results["boxes-1"]["multiply_adds"]
    )
    assert Image.open(tmp_path / "growth.png").size[0] > 500


def test_every_tool_is_executable_and_explains_itself():
    for tool in sorted((ROOT / "tools").glob("*.py")):
        text = tool.read_text()
        if text.startswith("#!"):
            assert os.access(tool, os.X_OK), f"{tool} is not executable"
            if tool.name not in ("install.py",):
                assert f"tools/{tool.name}" in text.split('"""')[1], f"{tool} shows no example"
