"""samdetr.checkpoint.pickles: the weights of detectron2's model zoo, without the code that a pickle may hold."""

import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from helpers import tiny_model
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint
from samdetr.errors import UserError


class RunsCode:
    def __reduce__(self):
        return print, ("this code has run",)


def write(path, content, **options):
    with open(path, "wb") as file:
        pickle.dump(content, file, **options)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_plain_containers_are_read(tmp_path, protocol):
    weights = OrderedDict(
        a=np.arange(6.0).reshape(2, 3).T, b=np.float32(2) * np.ones(1, np.float32), c=np.zeros((0, 2))
    )
    content = {"model": weights, "__author__": "Detectron2 Model Zoo"}
    read = Checkpoint.read(write(tmp_path / "a.pkl", content, protocol=protocol))
    assert all(np.array_equal(read.weights[name], value) for name, value in weights.items())


def test_caffe2_files_lose_the_state_of_their_optimizer(tmp_path):
    blobs = {"conv1_w": np.ones(2, np.float32), "conv1_w_momentum": np.ones(2, np.float32)}
    read = Checkpoint.read(write(tmp_path / "a.pkl", {"blobs": blobs}))
    assert list(read.weights) == ["conv1_w"] and read.entries["matching_heuristics"] is True


@pytest.mark.parametrize(
    "content",
    [
        RunsCode(),
        {"model": {"a": RunsCode()}, "__author__": "x"},
        {"model": {"a": np.array([RunsCode()], object)}, "__author__": "x"},
        {"model": {"a": eval}, "__author__": "x"},
    ],
)
def test_code_is_refused_and_does_not_run(content, tmp_path, capsys):
    with pytest.raises(UserError, match=r"a\.pkl is damaged or not a file of weights .* can run code"):
        Checkpoint.read_local(str(write(tmp_path / "a.pkl", content)))
    assert "this code has run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1], {"model": 3, "__author__": "x"}, {"a": "text"}, {"a": np.array(["text"])}])
def test_what_is_no_file_of_weights_is_refused(content, tmp_path):
    with pytest.raises(UserError, match=r"a\.pkl"):
        Checkpoint.read(write(tmp_path / "a.pkl", content))


def test_damage_is_refused(tmp_path):
    path = write(tmp_path / "a.pkl", {"model": {"a": np.ones(100)}, "__author__": "x"})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="damaged"):
        Checkpoint.read(path)


@pytest.mark.parametrize("read_before", [True, False])
def test_a_backbone_of_the_model_zoo_initialises_a_model(read_before, tmp_path, caplog):
    model = tiny_model()
    weights = {"stem.conv1.weight": np.full(tuple(model.backbone.stem.conv1.weight.shape), 0.5, np.float32)}
    content = {"model": weights, "__author__": "torchvision", "matching_heuristics": True}
    path = write(tmp_path / "R-50.pkl", content)
    checkpointer = CheckedCheckpointer(model, complete=False)
    checkpointer.load(Checkpoint.read(path) if read_before else str(path))
    assert torch.all(model.backbone.stem.conv1.weight == 0.5)
    others = len([name for name in model.backbone.state_dict() if "num_batches" not in name]) - 1
    assert f"has {others} of the backbone's {others + 1} arrays in no usable shape or not at all" in caplog.text


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        (None, np.nan, r"R-50\.pkl has values for backbone\.stem\.conv1\.weight that are not finite"),
        ((3, 3), 0.5, r"R-50\.pkl has none of this model's backbone"),
    ],
)
def test_a_backbone_that_does_not_fit_or_is_broken_is_refused(shape, value, message, tmp_path):
    model = tiny_model()
    weights = {"stem.conv1.weight": np.full(shape or tuple(model.backbone.stem.conv1.weight.shape), value, np.float32)}
    path = write(tmp_path / "R-50.pkl", {"model": weights, "__author__": "torchvision", "matching_heuristics": True})
    with pytest.raises(UserError, match=message):
        CheckedCheckpointer(model, complete=False).load(str(path))
