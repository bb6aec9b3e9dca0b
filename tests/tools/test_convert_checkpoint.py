"""tools/convert_checkpoint.py: the authors' files, and files that are none."""

import argparse

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

import samdetr
from helpers import converted_model, load_config, make_input, published_state_dict
from processes import run_tool


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
