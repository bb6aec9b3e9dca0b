"""samdetr.checkpoint.published: the authors' files under this project's names."""

import pytest
import torch

from helpers import published_state_dict
from samdetr.checkpoint import convert_published_state_dict, recognize_published


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


@pytest.mark.parametrize(
    ("name", "file_name", "extra", "expected"),
    [
        ("r50_12ep", "r50.pth", {}, "sam_detr_R_50_1x"),
        ("r50_50ep", "r50.pth", {}, "sam_detr_R_50_50ep"),
        ("r50_smca_12ep", "r50_dc5_smca.pth", {}, "sam_detr_smca_R_50_DC5_1x"),
        ("r50_ms_12ep", "r50_ms.pth", {"epoch": 49}, "sam_detr_pp_R_50_50ep"),
        ("r50_ms_smca_12ep", "r50_ms_smca_e50.pth", {}, "sam_detr_pp_smca_R_50_50ep"),
        ("r50_ms_smca_12ep", "sam_detr_pp_smca_R_50_1x.pth", {}, "sam_detr_pp_smca_R_50_1x"),
    ],
)
def test_variants_are_recognised(name, file_name, extra, expected):
    assert recognize_published(published_state_dict(name), extra, file_name)[0] == expected
