"""samdetr.modeling.postprocessing by hand."""

import torch

from samdetr.modeling.postprocessing import select_detections


def test_best_pairs_of_query_and_class():
    logits = torch.full((1, 2, 3), -10.0)
    logits[0, 1, 2], logits[0, 0, 1], logits[0, 1, 0] = 3.0, 2.0, 1.0
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]])
    (result,) = select_detections(logits, boxes, [(100, 200)], max_detections=3)
    assert result.pred_classes.tolist() == [2, 1, 0]
    assert result.query_indices.tolist() == [1, 0, 1]
    assert torch.allclose(result.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    expected = torch.tensor([[0.0, 0, 100, 100], [80, 30, 120, 70], [0, 0, 100, 100]])
    assert torch.allclose(result.pred_boxes.tensor, expected)
    assert result.image_size == (100, 200)


def test_fewer_pairs_than_asked_for():
    results = select_detections(torch.randn(2, 2, 3), torch.rand(2, 2, 4), [(10, 10), (20, 30)], max_detections=100)
    assert [len(result) for result in results] == [6, 6]
    assert (results[0].scores[:-1] >= results[0].scores[1:]).all()


def test_a_result_does_not_depend_on_the_batch_nor_change_its_inputs():
    logits, boxes = torch.randn(3, 4, 5), torch.rand(3, 4, 4)
    before = boxes.clone()
    sizes = [(10, 20), (30, 40), (50, 60)]
    together = select_detections(logits, boxes, sizes, 7)[1]
    (alone,) = select_detections(logits[1:2], boxes[1:2], sizes[1:2], 7)
    assert torch.equal(together.pred_boxes.tensor, alone.pred_boxes.tensor)
    assert torch.equal(boxes, before)
