"""samdetr.checkpoint: agreement with the authors' public model on seeded weights (tests/data/reference)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load_config
from detectron2.modeling import build_model

from samdetr.checkpoint import convert_published_state_dict
from seeded_weights import fill, seeded_image

REFERENCE = Path(__file__).parent / "data" / "reference"
CASES = {
    "r50_12ep": "sam_detr_R_50_1x",
    "r50_50ep": "sam_detr_R_50_50ep",
    "r50_smca_12ep": "sam_detr_smca_R_50_1x",
    "r50_dc5_smca_12ep": "sam_detr_smca_R_50_DC5_1x",
    "r50_ms_12ep": "sam_detr_pp_R_50_1x",
    "r50_ms_smca_12ep": "sam_detr_pp_smca_R_50_1x",
}


def published_shapes(name):
    return {key: tuple(shape) for key, shape in json.loads((REFERENCE / f"{name}.keys.json").read_text()).items()}


def published_state_dict(name):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in fill(published_shapes(name)).items()}


def converted_model(name):
    model = build_model(load_config(CASES[name])).eval()
    model.load_state_dict(convert_published_state_dict(published_state_dict(name)))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_agreement_with_the_published_model(name):
    model = converted_model(name)
    expected = np.load(REFERENCE / f"{name}.npz")
    for i, (seed, height, width) in enumerate([(7, 256, 320), (8, 224, 288)]):
        out = model.predict([{"image": torch.from_numpy(seeded_image(seed, height, width))}])
        logits = out["pred_logits"][:, 0, :40].numpy() - expected["pred_logits"][:, i]
        boxes = out["pred_boxes"][:, 0, :40].numpy() - expected["pred_boxes"][:, i]
        assert np.abs(logits).max() < 1e-4
        assert np.abs(boxes).max() < 1e-5


@pytest.mark.slow
def test_padding_changes_only_the_backbones_response_at_the_border():
    """The smaller image beside the larger one: by how much stands in the README; the larger one does not change."""
    model = converted_model("r50_smca_12ep")
    images = [{"image": torch.from_numpy(seeded_image(*image))} for image in [(7, 256, 320), (8, 224, 288)]]
    together = model.predict(images)["pred_logits"]
    larger, smaller = (model.predict([image])["pred_logits"][:, 0] for image in images)
    assert (together[:, 0] - larger).abs().max() < 1e-4
    assert 0 < (together[:, 1] - smaller).abs().mean() < 0.12
    # The published code: 1.7 at most, 0.12 in the mean (tests/data/reference/README.md).
    assert (together[:, 1] - smaller).abs().max() < 1.2


def small_published_state_dict(num_classes):
    """The parts of a published checkpoint whose conversion does more than renaming."""
    return {
        "class_embed.0.weight": torch.arange(float(num_classes))[:, None].expand(-1, 3),
        "class_embed.0.bias": torch.arange(float(num_classes)),
        "transformer.decoder.bbox_embed.0.layers.0.weight": torch.zeros(2, 2),
        "bbox_embed.0.layers.0.weight": torch.ones(2, 2),
        "input_proj.0.0.weight": torch.rand(3, 5, 1, 1),
        "transformer.decoder.layers.0.point1.0.weight": torch.rand(2, 8, 1, 1),
        # Two channels of 2 x 2 pixels: (channel, y, x).
        "transformer.decoder.layers.0.point2.0.weight": torch.arange(8.0)[None],
    }


def test_classes_of_raw_coco_ids_become_contiguous():
    converted = convert_published_state_dict(small_published_state_dict(91))
    rows = converted["decoder.class_heads.0.bias"].tolist()
    assert len(rows) == 80
    # person is id 1, stop sign 13 (12 is unused), toothbrush 90: COCO's list of categories.
    assert rows[:3] == [1, 2, 3] and rows[11] == 13 and rows[-1] == 90
    assert converted["decoder.class_heads.0.weight"][11, 0] == 13


def test_classes_can_be_kept():
    converted = convert_published_state_dict(small_published_state_dict(91), num_classes=91)
    assert converted["decoder.class_heads.0.bias"].tolist() == list(range(91))


def test_duplicated_box_heads_and_reordered_weights():
    converted = convert_published_state_dict(small_published_state_dict(80))
    assert (converted["decoder.box_heads.0.layers.0.weight"] == 1).all()
    assert converted["feature_projection.projections.0.weight"].shape == (3, 5)
    first = converted["decoder.layers.0.aligner.keypoint_head.layers.0.weight"]
    assert first.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]  # (y, x, channel)


def test_class_counts_that_cannot_be_converted():
    with pytest.raises(ValueError, match=r"has 91 outputs and cannot be converted to 20 classes"):
        convert_published_state_dict(small_published_state_dict(91), num_classes=20)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match=r"1 of 8 parameters are not those.*'transformer\.encoder\.foo'"):
        convert_published_state_dict({**small_published_state_dict(80), "transformer.encoder.foo": torch.zeros(1)})
