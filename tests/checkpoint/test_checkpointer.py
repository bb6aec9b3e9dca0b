"""samdetr.checkpoint.checkpointer: saving and loading in a run."""

import weakref

import pytest
import torch
from detectron2.modeling import build_model

from helpers import tiny_config, tiny_model
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    checkpointer = CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True)
    checkpointer.save("model_0000001")
    good = (tmp_path / "model_0000001.pth").read_bytes()

    def interrupted(data, f):
        f.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(KeyboardInterrupt):
            checkpointer.save(name)
    assert (tmp_path / "model_0000001.pth").read_bytes() == good
    assert not (tmp_path / "model_0000002.pth").exists()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


def test_another_class_count_starts_from_scratch_and_says_so(tmp_path, caplog):
    options = ["MODEL.SAMDETR.QUERY_GENERATOR.NAME", "DenoisingQueryGenerator", "MODEL.SAMDETR.NUM_CLASSES"]
    trained, model = build_model(tiny_config(*options, 10)), build_model(tiny_config(*options, 3))
    path = tmp_path / "ten.pth"
    torch.save({"model": trained.state_dict()}, path)
    before = model.decoder.class_heads[0].weight.clone()
    CheckedCheckpointer(model, complete=False).load(str(path))
    assert "another number of classes" in caplog.text
    assert "decoder.class_heads.2.weight" in caplog.text and "label_embedding.weight start from scratch" in caplog.text
    assert torch.equal(model.decoder.class_heads[0].weight, before)
    assert torch.equal(model.decoder.box_heads[0].layers[0].weight, trained.decoder.box_heads[0].layers[0].weight)


def test_a_loaded_checkpoint_does_not_stay_in_memory(tmp_path):
    CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True).save("model")
    checkpoint = Checkpoint.read(tmp_path / "model.pth")
    alive = weakref.ref(checkpoint)
    checkpointer = CheckedCheckpointer(tiny_model(), complete=True)
    checkpointer.load(checkpoint)
    del checkpoint
    assert alive() is None


def test_a_checkpoint_that_was_made_in_memory_is_not_left_out_silently():
    model = tiny_model()
    with pytest.raises(ValueError, match="read from a file"):
        CheckedCheckpointer(model, complete=True).load(Checkpoint({"model": model.state_dict()}))


@pytest.mark.parametrize(("entries", "warns"), [({}, True), ({"metric": 0.0}, False)])
def test_only_the_best_weights_are_the_average_without_an_average(tmp_path, caplog, entries, warns):
    CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True).save("model", **entries)
    CheckedCheckpointer(tiny_model(), complete=True, use_average=True).load(str(tmp_path / "model.pth"))
    assert ("holds no moving average" in caplog.text) == warns
