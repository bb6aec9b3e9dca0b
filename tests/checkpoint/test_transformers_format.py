"""samdetr.checkpoint.transformers_format: names of transformers' DETRs; tests/modeling/baselines compares whole models."""

import logging

import pytest
import torch
from detectron2.modeling import build_backbone, build_model

from helpers import load_config, tiny_config
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint, convert_transformers_state_dict
from samdetr.checkpoint.transformers_format import is_transformers_state_dict
from samdetr.errors import UserError


def some_weights(num_outputs=4, **extra):
    """The parts of a Conditional DETR's state dict whose names tell what it is."""
    return {
        "model.backbone.model.conv1.weight": torch.zeros(2, 3, 7, 7),
        "model.encoder.layers.0.mlp.fc1.weight": torch.ones(2, 2),
        "model.decoder.query_scale.layers.0.weight": torch.ones(2, 2),
        "class_labels_classifier.weight": torch.arange(float(num_outputs))[:, None].expand(-1, 2),
        "class_labels_classifier.bias": torch.arange(float(num_outputs)),
        "bbox_predictor.layers.2.bias": torch.ones(4),
        **extra,
    }


@pytest.mark.parametrize("prefix", ["model.backbone.model.", "model.backbone.conv_encoder.model._backbone."])
def test_names_of_timms_resnet(prefix):
    """All of ResNet-50's, which have torchvision's names, as DETR has them now, and DAB-DETR and the hub's files."""
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("resnet50", features_only=True).state_dict()
        ours = build_backbone(load_config("baselines/detr_R_50_1x")).state_dict()
    converted = convert_transformers_state_dict({prefix + key: value for key, value in theirs.items()})
    assert {key.removeprefix("backbone."): value.shape for key, value in converted.items()} == {
        key: value.shape for key, value in ours.items()
    }


def test_names_of_older_files():
    older = {
        "model.encoder.layers.3.fc2.bias": "network.encoder.layers.3.mlp.fc2.bias",
        "model.encoder.layers.0.self_attn.out_proj.weight": "network.encoder.layers.0.self_attn.o_proj.weight",
        "model.decoder.layers.1.sa_qcontent_proj.bias": "network.decoder.layers.1.self_attn.q_content_proj.bias",
        "model.decoder.layers.1.sa_v_proj.bias": "network.decoder.layers.1.self_attn.v_proj.bias",
        "model.decoder.layers.2.ca_kpos_proj.bias": "network.decoder.layers.2.encoder_attn.k_pos_proj.bias",
        "model.decoder.layers.2.ca_qpos_sine_proj.bias": "network.decoder.layers.2.encoder_attn.q_pos_sine_proj.bias",
    }
    values = {name: torch.zeros(1) for name in older}
    assert list(convert_transformers_state_dict(values)) == list(older.values())
    dab = {
        "model.query_refpoint_embeddings.weight": torch.zeros(3, 4),
        "model.encoder.layers.3.fc2.bias": torch.zeros(1),
    }
    assert list(convert_transformers_state_dict(dab))[1] == "network.encoder.layers.3.fc2.bias"  # as it is now, too


def test_other_state_dicts_are_not_taken_for_one_of_these():
    model = build_model(load_config("sam_detr_digits"))
    assert is_transformers_state_dict(some_weights())
    for names in (model.state_dict(), ["model.backbone.conv1.weight"], ["model.encoder.layers.0.mlp.fc1.weight"], []):
        assert not is_transformers_state_dict(names)


def test_the_output_for_no_object_is_left_out_of_a_softmax_detr(caplog):
    weights = some_weights()
    assert convert_transformers_state_dict(weights)["class_head.bias"].tolist() == [0, 1, 2, 3]
    assert not caplog.records
    del weights["model.decoder.query_scale.layers.0.weight"]
    with caplog.at_level(logging.WARNING):
        converted = convert_transformers_state_dict(weights)
    assert converted["class_head.bias"].tolist() == [0, 1, 2] and converted["class_head.weight"].shape == (3, 2)
    assert "a DETR with softmax loss" in caplog.text


def test_cocos_raw_ids_become_contiguous():
    rows = convert_transformers_state_dict(some_weights(91))["class_head.bias"].tolist()
    # person is id 1, stop sign 13 (12 is unused), toothbrush 90: COCO's list of categories.
    assert len(rows) == 80 and rows[:3] == [1, 2, 3] and rows[11] == 13 and rows[-1] == 90


def test_heads_are_taken_once_and_refined_boxes_are_refused(tmp_path):
    heads = {f"class_embed.{i}.bias": torch.ones(3) for i in range(3)}
    assert list(convert_transformers_state_dict(heads)) == ["class_head.bias"]
    heads["class_embed.2.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match="with box refinement, which is not here"):
        convert_transformers_state_dict(heads)
    torch.save(some_weights(**{"model.decoder.bbox_embed.0.layers.0.weight": torch.ones(2)}), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"MODEL\.WEIGHTS .*a\.pth cannot be used: .*box refinement"):
        Checkpoint.read(tmp_path / "a.pth")


def test_unknown_parameters_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"'mask_head\.conv1\.weight' is not one of a DETR of transformers"):
        convert_transformers_state_dict(some_weights(**{"mask_head.conv1.weight": torch.ones(2)}))
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"b\.safetensors is truncated, damaged or not a file of weights"):
        Checkpoint.read(tmp_path / "b.safetensors")


def test_other_classes_start_from_scratch(tmp_path, caplog):
    """A run that starts from a file with other classes; the file holds a part of the model."""
    model = build_model(tiny_config("MODEL.META_ARCHITECTURE", "TransformersDETR"))
    stem = torch.full_like(model.backbone.stem.conv1.weight, 0.5)
    weights = {"model.backbone.model.conv1.weight": stem, "class_labels_classifier.bias": torch.ones(5)}
    torch.save({**weights, "model.encoder.layers.0.mlp.fc1.bias": torch.zeros(48)}, tmp_path / "hub.bin")
    with caplog.at_level(logging.WARNING):
        CheckedCheckpointer(model, complete=False).load(str(tmp_path / "hub.bin"))
    assert "another number of classes: class_head.bias start from scratch" in caplog.text
    assert torch.equal(model.backbone.stem.conv1.weight, stem)
