"""samdetr.visualization.attention: what is drawn is what the model used."""

import numpy as np
import pytest
import torch

from helpers import MULTI_SCALE, PLAIN, SMCA, make_input, tiny_model
from samdetr.visualization import (
    draw_attention,
    draw_head,
    record_attention,
)
from samdetr.visualization.attention import QueryView

IDENTITY = ["MODEL.SAMDETR.ALIGNER.NAME", "IdentityAligner"]


@pytest.mark.parametrize(
    "options",
    [SMCA, PLAIN, [*SMCA, *MULTI_SCALE], [*SMCA, *IDENTITY]],
    ids=["smca", "plain", "multi-scale", "identity"],
)
def test_recorded_weights_are_those_that_the_model_used(options):
    """They sum to one over the unpadded pixels, and the attention's output is rebuilt from them."""
    model = tiny_model(*options).eval()
    with record_attention(model) as layers:
        expected = model.predict([make_input(64, 96), make_input(96, 64, seed=1)])
    assert torch.equal(
        expected["pred_logits"], model.predict([make_input(64, 96), make_input(96, 64, seed=1)])["pred_logits"]
    )
    assert len(layers) == 3
    queries = [0, 5, 11]
    for i, layer in enumerate(layers):
        weights = layer.attention_weights(queries)
        assert weights.shape == (2, 3, 4, *layer.level.size)
        assert torch.allclose(weights.sum((-1, -2)), torch.ones(2, 3, 4), atol=1e-5)
        assert not weights.masked_select(layer.level.padding_mask[:, None, None]).any()
        value = layer.cross_attention.value(layer.level.features).flatten(1, 2).unflatten(-1, (4, -1))
        rebuilt = torch.einsum("bqmn,bnmd->bqmd", weights.flatten(-2), value).flatten(2)
        assert torch.allclose(layer.cross_attention.output(rebuilt), layer.output[:, queries], atol=1e-5)
        if i:
            assert torch.equal(layer.reference_boxes, expected["pred_boxes"][i - 1])
        gaussians = layer.gaussians(queries)
        assert (gaussians is None) == (options is PLAIN)
        if gaussians is not None:
            assert 0 <= gaussians.min() <= gaussians.max() <= 1
    assert [layer.level_index for layer in layers] == ([2, 1, 0] if len(options) > 4 else [0, 0, 0])


@pytest.mark.parametrize("options", [SMCA, PLAIN], ids=["smca", "plain"])
def test_mixed_precision_is_recorded_too(options):
    model, image = tiny_model(*options).eval(), make_input(64, 96)
    found = []
    for enabled in (True, False):
        with record_attention(model) as layers, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.predict([image])
        assert layers[0].precision == (torch.bfloat16 if enabled else None)
        found.append([layers[0].attention_weights([0, 5]), layers[0].gaussians([0, 5])])
        draw_attention(image["image"].permute(1, 2, 0).numpy(), layers, 0, "a title")
    for half, whole in zip(*found):
        assert (half is None) == (whole is None) == (options is PLAIN and whole is None)
        if half is not None:
            assert half.dtype == torch.float32 and torch.allclose(half, whole, atol=0.05)


def test_the_latest_forward_pass_is_recorded():
    model = tiny_model().eval()
    with record_attention(model) as layers:
        model.predict([make_input(64, 64)])
        model.predict([make_input(96, 64)])
        assert len(layers) == 3 and layers[0].level.size == (12, 8)
    model.predict([make_input(64, 64)])
    assert layers[0].level.size == (12, 8)  # the hooks are gone


def test_a_cross_attention_that_exposes_no_weights():
    model = tiny_model().eval()
    model.decoder.layers[1].cross_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="does not expose its attention weights"), record_attention(model):
        pass


def test_attention_sheets_show_layers_and_heads():
    model = tiny_model().eval()
    image = np.random.RandomState(0).randint(0, 255, (64, 96, 3), dtype=np.uint8)
    with record_attention(model) as layers:
        model.predict([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}])
    sheet, other = draw_attention(image, layers, 0, "a title"), draw_attention(image, layers, 1, "a title")
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and sheet.shape[1] > sheet.shape[0]
    assert sheet.shape == other.shape and (sheet != other).any()
    heads = [draw_head(image, layers[-1], 0, head) for head in range(2)]
    assert heads[0].shape == heads[1].shape and (heads[0] != heads[1]).any()


def test_drawn_places_are_those_of_the_image():
    """Beside a larger image: box, keypoints and attention lie in the image itself, without its padding."""
    model = tiny_model().eval()
    image = np.zeros((64, 96, 3), np.uint8)
    small = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy())}
    with record_attention(model) as layers:
        model.predict([small, make_input(128, 128)])
    layer = layers[1]
    view = QueryView(image, layer, 3)
    cx, cy, w, h = layer.reference_boxes[0, 3].tolist()
    assert view.corner == pytest.approx(((cx - w / 2) * 96, (cy - h / 2) * 64))
    assert view.box_size == pytest.approx((w * 96, h * 64))
    assert np.allclose(view.keypoints, layer.query.keypoints[0, 3] * torch.tensor([96, 64]))
    assert view.weights.shape == (4, 8, 12) and np.allclose(view.weights.sum((1, 2)), 1, atol=1e-5)
    assert view.pixel_centres[0][0] == 4 and view.pixel_centres[0][-1] == 92  # stride 8
    # The Gaussian's greatest value is at the pixel nearest to the keypoint, if that is inside.
    x, y = view.keypoints[0].clip(0, (95, 63))
    row, column = np.unravel_index(view.gaussians[0].argmax(), view.gaussians[0].shape)
    assert abs(view.pixel_centres[0][column] - x) <= 4 and abs(view.pixel_centres[1][row] - y) <= 4
