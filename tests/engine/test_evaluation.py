"""samdetr.engine.evaluation: image by image, it agrees with the run's evaluation."""

import json

import pytest
import torch

from samdetr.engine.evaluation import evaluate_images, f1


def test_f1_by_hand():
    from detectron2.structures import Boxes, BoxMode, Instances

    record = {
        "annotations": [
            {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
            {"bbox": [20, 20, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 2},
        ]
    }
    found = Instances((40, 40))
    # A hit, the same box again, the right place with the wrong class, and one below the threshold.
    found.pred_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [20, 20, 30, 30]]))
    found.scores, found.pred_classes = torch.tensor([0.9, 0.8, 0.7, 0.1]), torch.tensor([1, 1, 3, 2])
    assert f1(record, found, 0.3) == pytest.approx(2 * 1 / (2 + 3))
    assert f1(record, found, 0.05) == pytest.approx(2 * 2 / (2 + 4))
    assert f1({"annotations": []}, found, 0.95) == 1.0


@pytest.mark.slow
def test_image_by_image_it_agrees_with_the_run(run_folder):
    """AP of all images, as COCOEvaluator has written it at the end of the run."""
    import samdetr

    predictor = samdetr.load(run_folder / "model_final.pth", device="cpu")
    evaluation = evaluate_images(predictor.cfg, predictor.model, predictor.cfg.DATASETS.TEST[0], None, 0.3)
    written = json.loads((run_folder / "evaluation.json").read_text())["results"]["bbox"]
    assert evaluation.results == pytest.approx(written, abs=1e-6, nan_ok=True)
    assert len(evaluation.records) == len(evaluation.detections) == len(evaluation.quality) == 200
    assert evaluation.precision.shape == (10, 101)
    assert 100 * evaluation.precision.mean() == pytest.approx(written["AP"], abs=1e-6)
