"""samdetr.visualization: what is drawn is what the model used."""

import json

import numpy as np
import pytest
import torch
from conftest import MULTI_SCALE, PLAIN, SMCA, make_input, tiny_model
from detectron2.structures import Boxes, Instances

from samdetr.visualization import (
    draw_attention,
    draw_curves,
    draw_detections,
    draw_head,
    draw_pairs,
    published_curves,
    published_names,
    read_metrics,
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


def test_the_latest_forward_pass_is_recorded():
    model = tiny_model().eval()
    with record_attention(model) as layers:
        model.predict([make_input(64, 64)])
        model.predict([make_input(96, 64)])
        assert len(layers) == 3 and layers[0].level.size == (12, 8)
    model.predict([make_input(64, 64)])
    assert layers[0].level.size == (12, 8)  # the hooks are gone


def test_a_cross_attention_that_does_not_tell(monkeypatch):
    model = tiny_model().eval()
    model.decoder.layers[1].cross_attention = torch.nn.Identity()
    with pytest.raises(ValueError, match="does not tell its attention weights"), record_attention(model):
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


def test_only_confident_detections_are_drawn():
    image = np.zeros((64, 64, 3), np.uint8)
    instances = Instances((64, 64))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5, 30, 30], [40, 40, 60, 60]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9, 0.2]), torch.tensor([0, 1])
    drawn = draw_detections(image, instances, ["a", "b"], 0.5)
    half = drawn.shape[0] // 2
    assert drawn[:half, :half].any() and not drawn[half + 20 :, half + 20 :].any()
    sheet = draw_pairs([(drawn, drawn)] * 3, columns=2)
    assert sheet.shape == (2 * (drawn.shape[0] + 8), 2 * (2 * drawn.shape[1] + 10), 3)


def write_metrics(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_metrics_of_a_resumed_run(tmp_path):
    lines = [{"iteration": i, "epoch": (i + 1) / 10, "total_loss": 9 - i, "lr": 0.1} for i in (1, 3, 5)]
    lines += [{"iteration": 4, "bbox/AP": 7.0}, {"iteration": 3, "epoch": 0.4, "total_loss": 5.5, "lr": 0.1}]
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", lines).parent)
    assert metrics["total_loss"] == [(1, 0.2, 8), (3, 0.4, 5.5), (5, 0.6, 4)]
    assert metrics["bbox/AP"][0][0] == 4


@pytest.mark.parametrize("content", [b"", b"no json", b'{"lr": 1}', b"[1]", b"\x80\x02\xff"])
def test_files_that_are_no_metrics(tmp_path, content):
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.json (holds no metrics|is not a run's)"):
        read_metrics(tmp_path)


def test_an_unfinished_line_costs_itself_only(tmp_path, caplog):
    path = write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "lr": 0.5}, {"iteration": 2, "lr": 0.25}])
    path.write_text(path.read_text()[:-8])
    assert read_metrics(path)["lr"] == [(1, pytest.approx(float("nan"), nan_ok=True), 0.5)]
    assert "line 2 is not a line of metrics" in caplog.text


def test_a_run_without_known_metrics(tmp_path):
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "mine": 2.0}]))
    with pytest.raises(ValueError, match="has none of the metrics that are drawn"):
        draw_curves({"mine": metrics})


def test_missing_metrics(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.json: there is no such file"):
        read_metrics(tmp_path)


def test_curves_lie_where_the_numbers_are(tmp_path):
    lines = [{"iteration": i, "epoch": (i + 1) / 10, "total_loss": 9 - i, "lr": 0.1, "time": 1.0} for i in (1, 3)]
    lines += [{"iteration": 2, "bbox/AP": 7.0}]
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", lines))
    figure = draw_curves({"mine": metrics})
    axes = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
    assert all(axis.axison == bool(axis.get_title()) for axis in figure.axes)  # no empty panel is left
    assert set(axes) == {"training loss, all layers", "box AP", "learning rate", "seconds a step"}
    loss = axes["training loss, all layers"]
    assert loss.lines[0].get_xydata().tolist() == [[1, 8], [3, 6]] and loss.get_xlabel() == "iteration"
    published = draw_curves({"mine": metrics}, ["r50_smca_e12", "r50_e12"])
    axes = {axis.get_title(): axis for axis in published.axes}
    assert axes["box AP"].get_xlabel() == "epoch"
    theirs, others, mine = axes["box AP"].lines
    assert theirs.get_xdata().tolist() == list(range(1, 13)) and theirs.get_label() == "r50_smca_e12 (published, COCO)"
    assert theirs.get_linestyle() != others.get_linestyle()
    assert mine.get_xydata().tolist() == [[pytest.approx(0.3), 7.0]]  # halfway between what is known


def test_published_curves_are_the_papers():
    assert len(published_names()) == 12
    assert published_curves("r50_dc5_e12")["bbox/AP"][0][1:] == (1, 12.42)
    with pytest.raises(ValueError, match="--published nothing: there is no such model; choose from r50"):
        published_curves("nothing")


def test_published_curves_need_epochs(tmp_path):
    metrics = read_metrics(write_metrics(tmp_path / "metrics.json", [{"iteration": 1, "total_loss": 2.0}]))
    with pytest.raises(ValueError, match="mine does not tell its epochs"):
        draw_curves({"mine": metrics}, ["r50_e12"])
