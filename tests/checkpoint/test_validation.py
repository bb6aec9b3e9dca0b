"""samdetr.checkpoint.validation: weights that do not fit are refused."""

import pytest
import torch
from detectron2.modeling import build_model

from helpers import load_experiment, tiny_model
from samdetr.checkpoint import check_fit
from samdetr.errors import UserError


@pytest.mark.parametrize(
    ("config", "key"),
    [
        *((name, "ROI_HEADS") for name in ("faster_rcnn", "cascade_rcnn")),
        *((name, "RETINANET") for name in ("retinanet", "fcos")),
        *((name, "SAMDETR") for name in ("sam_detr_plus", "sam_detr_pp_smca_dn", "smca_detr", "anchor_detr")),
        *((name, "SAMDETR") for name in ("sparse_rcnn", "detr", "dn_detr", "deformable_detr")),
    ],
)
def test_every_detector_can_be_tuned_to_other_classes(config, key):
    trained = build_model(load_experiment(config))
    model = build_model(load_experiment(config, f"MODEL.{key}.NUM_CLASSES", 3))
    check_fit("a.pth", model, trained.state_dict(), complete=False)
    with pytest.raises(UserError, match="another architecture"):
        check_fit("a.pth", model, trained.state_dict(), complete=True)


@pytest.mark.parametrize("complete", [True, False])
def test_weights_that_are_not_finite_are_refused(complete):
    model = tiny_model()
    weights = model.state_dict()
    weights["decoder.class_heads.0.weight"][0, 0] = torch.nan
    with pytest.raises(UserError, match=r"w\.pth has values that are not finite in decoder\.class_heads\.0\.weight"):
        check_fit("w.pth", model, weights, complete=complete)


def test_checkpoints_of_another_architecture():
    model = tiny_model()
    other = tiny_model("MODEL.SAMDETR.HIDDEN_DIM", 16).state_dict()
    with pytest.raises(UserError, match="of another architecture"):  # its backbone fits, the rest does not
        check_fit("w.pth", model, other, complete=False)
    with pytest.raises(UserError, match=r"beside tensors it has the entries state_dict, epoch.*see docs/models.md"):
        check_fit("w.pth", model, {"state_dict": {}, "epoch": 1}, complete=False)
    with pytest.raises(UserError, match=r"w\.pth is of another architecture.*of shape .* has shape"):
        check_fit("w.pth", model, other, complete=True)
    with pytest.raises(UserError, match=r"w\.pth has no parameter that fits.*'foo'"):
        check_fit("w.pth", model, {"foo": torch.zeros(1)}, complete=False)
    check_fit("w.pth", model, model.state_dict(), complete=True)
    with_denoising = tiny_model("MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator").state_dict()
    with pytest.raises(
        UserError, match=r"another architecture.* parameters are not in the model, such as query_generator"
    ):
        check_fit("w.pth", model, with_denoising, complete=True)  # the contents of its queries are missing in the model
    check_fit("w.pth", model, with_denoising, complete=False)
    with_dense_head = tiny_model("MODEL.SAMDETR.DENSE_HEAD.ENABLED", True).state_dict()
    check_fit("w.pth", model, with_dense_head, complete=True)  # for training only
    check_fit("w.pth", model, model.backbone.state_dict(prefix="backbone."), complete=False)
