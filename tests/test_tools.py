"""The scripts in tools/, run as a user runs them."""

import argparse
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_config, make_input, subprocess_environment, tiny_config
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from test_checkpoint import converted_model, published_state_dict

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
    """At 800 x 1066, without what the published code's count leaves out.

    That is RoIAlign, a compiled op there, and in dense encoders the product of queries and keys: given a padding mask,
    torch's attention computes it by baddbmm, which fvcore does not know.
    """
    from analyze_model import count_flops

    cfg = load_config(config)
    counts = count_flops(build_model(cfg).eval(), 800, 1066)
    known_to_fvcore = counts["total"] - counts["roi_align"]
    if cfg.MODEL.SAMDETR.ENCODER.NAME == "TransformerEncoder":
        stride = 16 if "DC5" in config else 32
        pixels = -(-800 // stride) * -(-1066 // stride)
        known_to_fvcore -= 6 * pixels**2 * 256
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
    assert counts["roi_align"] == 3 * 12 * 7 * (8 * 8 + 7 * 8) * 32


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
