"""tools/experiments/alignment.py: what it measures, on cases where the answer is known, and on a run."""

import json

import alignment
import pytest
import torch

from helpers import BEYOND, make_input, tiny_model
from samdetr.modeling.structures import FeatureLevel, ImageTarget


def test_attention_inside_a_box():
    level = FeatureLevel(torch.zeros(1, 4, 4, 8), torch.zeros(1), torch.tensor([[4.0, 4.0]]))
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])  # the upper left quarter, and everything
    even = torch.full((2, 3, 4, 4), 1 / 16)
    assert alignment.attention_inside(even, level, boxes) == pytest.approx((1 / 4 + 1) / 2)
    one_pixel = torch.zeros(2, 3, 4, 4)
    one_pixel[:, :, 1, 1] = 1
    assert alignment.attention_inside(one_pixel, level, boxes) == pytest.approx(1)


def test_distance_from_a_box():
    points = torch.tensor([[[0.5, 0.5], [0.9, 0.8]]])  # inside, and 0.3 to the right and 0.2 below
    assert alignment.distance_outside(points, torch.tensor([[0.5, 0.5, 0.2, 0.2]])) == pytest.approx(0.13**0.5 / 2)


@pytest.mark.parametrize("options", [[], BEYOND], ids=["learned", "selected"])
def test_matched_queries_of_a_model(options):
    model = tiny_model(*options).eval()
    target = ImageTarget(torch.tensor([3]), torch.tensor([[0.4, 0.5, 0.3, 0.4]]))
    image = {**make_input(64, 64), "image_id": 7}
    found = alignment.measure(model, [image], {7: target})
    assert 0 < found["attention_inside"] < 1 and found["keypoint_distance"] > 0
    # A selected query is known by the pixel that its reference box comes from.
    images = model.preprocess_images([image])
    levels = model.encode(images.tensor, images.image_sizes)
    predictions, queries = model.decode(levels)
    query = model.criterion.matcher(predictions, [target]).query[-1].item()
    expected = query
    if options:
        boxes = model.query_generator.selection.train()(levels).boxes[0, 0]
        expected = (boxes - queries.reference_logits[0, query].sigmoid()).abs().sum(1).argmin().item()
    assert found["matched"] == {7: {0: expected}}


@pytest.mark.slow
def test_a_run_is_measured_and_plotted(run_folder, tmp_path, tool):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "seed1").symlink_to(run_folder)
    output = tmp_path / "plot.png"
    arguments = ["--runs", tmp_path / "runs", "--names", "tiny", "--num-images", 4, "--output", output]
    status, printed = tool("alignment", *arguments)
    assert not status, printed
    points = json.loads(output.with_suffix(".json").read_text())["tiny"]
    assert [point["step"] for point in points] == [3, 6]
    assert "changed_matches" not in points[0] and 0 <= points[1]["changed_matches"] <= 1
    assert output.stat().st_size > 1000
    (tmp_path / "runs" / "empty" / "seed1").mkdir(parents=True)
    status, _ = tool("alignment", *[*arguments[:3], "empty", *arguments[4:]])
    assert "seed1 has 0 checkpoints: at least two are needed" in str(status)
