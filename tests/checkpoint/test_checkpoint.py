"""samdetr.checkpoint.checkpoint: read once, verified, written whole."""

import pytest
import torch
import yaml

from helpers import tiny_config, tiny_model
from samdetr.checkpoint import Checkpoint, describe_run
from samdetr.errors import UserError


def test_damaged_checkpoints(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": tiny_model().state_dict()}, path)
    Checkpoint.read(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged or not a checkpoint"):
        Checkpoint.read(path)
    path.write_text("this is not a checkpoint")
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged or not a checkpoint") as caught:
        Checkpoint.read(path)
    assert "\n" not in str(caught.value)


def test_checkpoints_with_other_objects_say_how_to_go_on(tmp_path):
    path = tmp_path / "model.pth"
    for new_format in (True, False):
        torch.save({"model": {}, "args": UserError("an object")}, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(UserError, match=r"holds Python objects.*UserError.*weights_only=False.*\"model\" entry"):
            Checkpoint.read(path)


def test_a_flipped_byte_inside_a_tensor_is_found(tmp_path):
    path = tmp_path / "model.pth"
    value = torch.arange(1000.0)
    torch.save({"model": {"weight": value}}, path)
    content = bytearray(path.read_bytes())
    content[content.index(value[500:504].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["model"]["weight"], value)  # torch does not notice
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged or not a checkpoint .*the checksum of"):
        Checkpoint.read(path)


def test_a_tensor_that_the_archive_calls_a_folder_is_found(tmp_path):
    """torch leaves the memory of such a tensor as it is, so that two readings differ."""
    path = tmp_path / "model.pth"
    torch.save({"model": {"weight": torch.ones(4)}}, path)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.pth is truncated, damaged .*data/0 is marked as a folder"):
        Checkpoint.read(path)


def test_what_a_checkpoint_holds(tmp_path):
    cfg = tiny_config("SEED", 12)
    weights = {"weight": torch.ones(2)}
    average = {"module.weight": torch.zeros(2), "n_averaged": torch.tensor(3)}
    Checkpoint({"model": weights, "average": average, "metric": 7.5, **describe_run(cfg)}).write(tmp_path / "a.pth")
    checkpoint = Checkpoint.read(tmp_path / "a.pth")
    assert torch.equal(checkpoint.weights["weight"], torch.ones(2))
    assert list(checkpoint.average) == ["weight"] and not checkpoint.average["weight"].any()
    assert checkpoint.class_names == [str(digit) for digit in range(10)] and checkpoint.category_ids[0] == 1
    assert checkpoint.metric == 7.5
    found = checkpoint.config()
    assert str(tmp_path / "a.pth") == found.MODEL.WEIGHTS
    found.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS
    assert yaml.safe_load(found.dump()) == yaml.safe_load(cfg.dump())
    torch.save(weights, tmp_path / "bare.pth")
    bare = Checkpoint.read(tmp_path / "bare.pth")
    assert list(bare.weights) == ["weight"] and bare.average is bare.config() is bare.class_names is bare.metric is None


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3)])
def test_files_of_torch_that_are_no_checkpoints(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth holds a (list|Tensor), not a checkpoint's dict"):
        Checkpoint.read(tmp_path / "a.pth", name="checkpoint")


@pytest.mark.parametrize(
    "entries",
    [
        *(
            {"model": None},
            {"model": {3: torch.ones(1)}},
            {"model": {"a": torch.ones(2).to_sparse()}},
            {"model": {"a": 1j * torch.ones(2)}},
        ),
        *({"model": {}, "average": [1]}, {"model": {}, "class_names": "abc"}, {"model": {}, "class_names": [1, 2]}),
        *({"model": {}, "category_ids": ["1"]}, {"model": {}, "config": 3}, {"model": {}, "iteration": "3"}),
        *(
            {"model": {}, "metric": "high"},
            {"model": {}, "trainer": []},
            {"model": {"a": torch.ones(1, device="meta")}},
        ),
    ],
)
def test_entries_of_other_types_are_refused(entries, tmp_path):
    torch.save(entries, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"odd\.pth is damaged or not a checkpoint of this project: "):
        Checkpoint.read(tmp_path / "odd.pth")
