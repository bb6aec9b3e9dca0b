"""samdetr.checkpoint.checkpointer: saving and loading in a run."""

import os
import resource
import signal
import weakref

import pytest
import torch
from detectron2.modeling import build_model

from helpers import tiny_config, tiny_model
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint
from samdetr.errors import UserError


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


def test_as_many_other_classes_keep_the_heads_and_it_says_so(tmp_path, caplog):
    trained, model = tiny_model(), tiny_model()
    names = [f"old {i}" for i in range(10)]
    torch.save({"model": trained.state_dict(), "class_names": names}, tmp_path / "ten.pth")
    message = "trained on other classes (old 0, old 1, old 2, old 3, old 4, ...), as many as here"
    for own, says in ((names, False), ([f"new {i}" for i in range(10)], True), (None, False)):
        caplog.clear()
        checkpointer = CheckedCheckpointer(model, complete=False, description={"class_names": own})
        checkpointer.load(str(tmp_path / "ten.pth"))
        assert (message in caplog.text) == says
    assert torch.equal(model.decoder.class_heads[0].weight, trained.decoder.class_heads[0].weight)


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


def test_where_the_average_is_taken(tmp_path, caplog):
    """It is what was evaluated, and so a start for another run; without SOLVER.EMA.ENABLED the weights are, and it says so."""
    weights = tiny_model().state_dict()
    average = {f"module.{name}": torch.zeros_like(value) for name, value in weights.items()}
    torch.save({"model": weights, "average": average}, tmp_path / "model.pth")
    for options, taken in (
        ({"complete": False}, True),
        ({"complete": True, "use_average": True}, True),
        ({"complete": True}, False),
    ):
        caplog.clear()
        model = tiny_model()
        CheckedCheckpointer(model, **options).load(str(tmp_path / "model.pth"))
        assert any(parameter.any() for parameter in model.parameters()) != taken
        assert ("also holds a moving average" in caplog.text) != taken


@pytest.mark.parametrize("last", [None, b"", b"\xff\xfe\x00", b"model_0000077.pth", b"../../etc/passwd", "folder"])
def test_the_newest_checkpoint_is_found_by_its_iteration(tmp_path, last):
    """Whatever copying has done to the times of the files, and damage to last_checkpoint."""
    checkpointer = CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True)
    for number in (9, 3, 12):
        checkpointer.save(f"model_{number:07d}", iteration=number)
    checkpointer.save("model_final", iteration=10)  # of a run that was made longer afterwards
    for number in (12, 9, 3):
        os.utime(tmp_path / f"model_{number:07d}.pth", (1000 - number, 1000 - number))
    (tmp_path / "last_checkpoint").unlink()
    if last == "folder":
        (tmp_path / "last_checkpoint").mkdir()
    elif last is not None:
        (tmp_path / "last_checkpoint").write_bytes(last)
    assert checkpointer.read_last().iteration == 12
    (tmp_path / "model_0000012.pth").write_bytes(b"half")
    assert checkpointer.read_last().iteration == 10


def test_the_marked_checkpoint_comes_first(tmp_path):
    checkpointer = CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True)
    for number in (3, 9):
        checkpointer.save(f"model_{number:07d}", iteration=number)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert checkpointer.read_last().iteration == 3


def test_a_full_disk_ends_in_one_line_and_loses_nothing(tmp_path):
    """A limit on the size of files stands for the full disk."""
    checkpointer = CheckedCheckpointer(tiny_model(), str(tmp_path), complete=True)
    checkpointer.save("model_0000001")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"model_0000002\.pth cannot be written \(.*resume from it"):
            checkpointer.save("model_0000002")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert checkpointer.read_last().path.endswith("model_0000001.pth")
