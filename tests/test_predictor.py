"""samdetr.predictor: a checkpoint alone suffices, and every kind of image gives the same detections."""

import logging
import pickle
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from run_exported import prepare

import samdetr
from helpers import tiny_config, tiny_model
from samdetr.checkpoint import CheckedCheckpointer, describe_run
from samdetr.errors import UserError
from samdetr.predictor import list_images, read_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of a random model, saved as the trainer saves it, and that model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    cfg = tiny_config("TEST.DETECTIONS_PER_IMAGE", 15, "INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 128)
    model = tiny_model().eval()
    CheckedCheckpointer(model, str(folder), complete=False, description=describe_run(cfg)).save("model_final")
    return folder / "model_final.pth", model, cfg


def photo(height=60, width=90, seed=0):
    return np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)


def equal(a, b, tolerance=0.0):
    same = torch.allclose(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=tolerance)
    return same and torch.allclose(a.scores, b.scores, atol=tolerance) and torch.equal(a.pred_classes, b.pred_classes)


def test_a_checkpoint_is_all_that_is_needed(checkpoint):
    path, model, _ = checkpoint
    predictor = samdetr.load(path, device="cpu")
    assert predictor.class_names == [str(digit) for digit in range(10)]
    assert predictor.cfg.INPUT.MIN_SIZE_TEST == 96 and str(path) == predictor.cfg.MODEL.WEIGHTS
    image = photo(64, 128)  # the longest side allows 128: not resized
    with torch.no_grad():
        expected = model([{"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 64, "width": 128}])
    found = predictor(image)
    assert len(found) == 15 and found.image_size == (64, 128)
    assert torch.equal(found.scores, expected[0]["instances"].scores[:15])


def test_the_file_is_opened_once(checkpoint):
    opened, active = [], [True]  # an audit hook cannot be removed, only switched off

    def hook(event, arguments):
        if event == "open" and active and str(arguments[0]) == str(checkpoint[0]):
            opened.append(arguments[0])

    sys.addaudithook(hook)
    samdetr.load(checkpoint[0], device="cpu")
    active.clear()
    assert len(opened) == 1


def test_every_kind_of_image(checkpoint, tmp_path):
    predictor = samdetr.load(checkpoint[0], device="cpu")
    image = photo()
    Image.fromarray(image).save(tmp_path / "a.png")
    expected = predictor(image)
    assert expected.image_size == (60, 90)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image)):
        assert equal(predictor(source), expected)
    grey = np.array(Image.fromarray(image).convert("L"))
    assert equal(predictor(grey), predictor(np.repeat(grey[..., None], 3, axis=2)))
    assert equal(predictor(Image.fromarray(image).convert("RGBA")), expected)


def test_several_images_at_once(checkpoint):
    """One at a time is exact; batches of one size differ by rounding only."""
    predictor = samdetr.load(checkpoint[0], device="cpu")
    images = [photo(seed=seed) for seed in range(3)] + [photo(90, 60)]
    alone = [predictor(image) for image in images]
    assert all(equal(a, b) for a, b in zip(predictor(images), alone))
    assert all(equal(a, b) for a, b in zip(predictor(iter(images)), alone))
    assert all(equal(a, b, 1e-3) for a, b in zip(predictor(images[:3], batch_size=2), alone))
    assert predictor([]) == []


def test_images_are_turned_upright(tmp_path):
    image = photo(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(image, -1))


def test_channel_order_follows_the_config(checkpoint):
    predictor = samdetr.load(checkpoint[0], device="cpu", options=["INPUT.FORMAT", "BGR"])
    image = photo()
    flipped = samdetr.load(checkpoint[0], device="cpu").prepare(image)["image"].flip(0)
    assert torch.equal(predictor.prepare(image)["image"], flipped)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3)), "of float64"),
        (np.zeros((4, 4, 4), np.uint8), r"\(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
    ],
)
def test_arrays_that_are_no_images(array, message):
    with pytest.raises(ValueError, match=message):
        read_image(array)


def test_files_that_are_no_images(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.jpg: there is no such file"):
        read_image(tmp_path / "missing.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.jpg is not an image"):
        read_image(tmp_path / "text.jpg")
    Image.fromarray(photo(200, 200)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png is not an image"):
        read_image(tmp_path / "cut.png")


def test_checkpoints_that_carry_nothing_need_a_config(checkpoint, tmp_path):
    path, model, cfg = checkpoint
    torch.save({"model": model.state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"bare\.pth carries no config: name the one that it was trained with") as error:
        samdetr.load(tmp_path / "bare.pth", device="cpu")
    assert error.value.argument == "config_file"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    names = [f"digit {i}" for i in range(10)]
    bare = samdetr.load(tmp_path / "bare.pth", config_file=tmp_path / "config.yaml", class_names=names, device="cpu")
    assert bare.class_names == names
    assert equal(bare(photo()), samdetr.load(path, device="cpu")(photo()))
    with pytest.raises(ValueError, match="3 class names for a model of 10 classes"):
        samdetr.load(path, class_names=["a", "b", "c"], device="cpu")


def test_classes_are_in_the_order_of_the_training_data(checkpoint, tmp_path):
    _, model, _ = checkpoint
    names = {"trained_on": list("abcdefghij"), "tested_on": list("jihgfedcba")}
    try:
        for name, classes in names.items():
            DatasetCatalog.register(name, list)
            MetadataCatalog.get(name).thing_classes = classes
        cfg = tiny_config("DATASETS.TRAIN", ("trained_on",), "DATASETS.TEST", ("tested_on",))
        torch.save({"model": model.state_dict(), "config": cfg.dump()}, tmp_path / "unnamed.pth")
        assert samdetr.load(tmp_path / "unnamed.pth", device="cpu").class_names == names["trained_on"]
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_a_checkpoint_that_does_not_fit_its_config(checkpoint, tmp_path):
    path, _, cfg = checkpoint
    other = cfg.clone()
    other.MODEL.SAMDETR.HIDDEN_DIM = 64
    (tmp_path / "config.yaml").write_text(other.dump())
    with pytest.raises(ValueError, match=r"does not fit|shape"):
        samdetr.load(path, config_file=tmp_path / "config.yaml", device="cpu")


def test_a_checkpoint_of_another_version(checkpoint, tmp_path):
    data = torch.load(checkpoint[0], weights_only=True)
    data["config"] = data["config"].replace("POOLED_SIZE", "POOLED_SIZE_OF_OLD")
    torch.save(data, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r"another version of this project .*POOLED_SIZE_OF_OLD"):
        samdetr.load(tmp_path / "old.pth", device="cpu")


def test_weights_that_the_options_name(checkpoint, tmp_path):
    data = torch.load(checkpoint[0], weights_only=True)
    data["model"] = {name: torch.zeros_like(value) for name, value in data["model"].items()}
    torch.save(data, tmp_path / "other.pth")
    predictor = samdetr.load(checkpoint[0], device="cpu", options=["MODEL.WEIGHTS", str(tmp_path / "other.pth")])
    assert not any(parameter.any() for parameter in predictor.model.parameters())
    with pytest.raises(UserError, match="pairs of KEY and VALUE, but there are 1"):
        samdetr.load(checkpoint[0], device="cpu", options=["MODEL.WEIGHTS"])


def test_weights_that_are_missing_are_named(checkpoint, tmp_path):
    cfg = checkpoint[2].clone()
    for name in ("gone.pth", "gone.pkl"):
        cfg.MODEL.WEIGHTS = str(tmp_path / name)
        (tmp_path / "config.yaml").write_text(cfg.dump())
        with pytest.raises(UserError, match=rf"MODEL\.WEIGHTS .*{name}: there is no such file"):
            samdetr.load(tmp_path / "config.yaml", device="cpu")
    with pytest.raises(UserError, match=r"nowhere\.yaml: there is no such file") as error:
        samdetr.load(tmp_path / "nowhere.yaml")
    assert error.value.argument == "source"
    for address in ("http://127.0.0.1:9/model.pth", "catalog://nothing"):
        with pytest.raises(UserError, match=f"{address} cannot be downloaded"):
            samdetr.load(address, device="cpu")


def test_a_pickled_model_of_detectron2_needs_a_config(checkpoint, tmp_path):
    path, model, cfg = checkpoint
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": weights, "__author__": "somebody"}))
    with pytest.raises(UserError, match=r"model\.pkl carries no config"):
        samdetr.load(tmp_path / "model.pkl", device="cpu")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    predictor = samdetr.load(tmp_path / "model.pkl", config_file=tmp_path / "config.yaml", device="cpu")
    assert equal(predictor(photo()), samdetr.load(path, device="cpu")(photo()))


def test_a_config_without_weights_warns_loudly(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text(tiny_config().dump())
    with caplog.at_level(logging.WARNING):
        samdetr.load(tmp_path / "config.yaml", device="cpu")
    assert "RANDOM weights" in caplog.text


def test_averaged_weights_are_what_predicts(checkpoint, tmp_path):
    data = torch.load(checkpoint[0], weights_only=True)
    cfg = tiny_config("SOLVER.EMA.ENABLED", True)
    data["config"] = cfg.dump()
    data["average"] = {f"module.{name}": torch.zeros_like(value) for name, value in data["model"].items()}
    torch.save(data, tmp_path / "averaged.pth")
    model = samdetr.load(tmp_path / "averaged.pth", device="cpu").model
    assert not any(parameter.any() for parameter in model.parameters())


def test_folders_and_missing_inputs(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.JPG", "sub/a.png", "notes.txt"):
        (tmp_path / name).write_text("")
    assert list_images([tmp_path], {".jpg", ".png"}) == [tmp_path / "b.JPG", tmp_path / "sub" / "a.png"]
    assert list_images([tmp_path / "notes.txt"], {".jpg"}) == [tmp_path / "notes.txt"]  # named, so meant
    with pytest.raises(ValueError, match=r"nowhere: there is no such file"):
        list_images([tmp_path / "nowhere"], {".jpg"})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "to").symlink_to(tmp_path / "sub")
    assert list_images([tmp_path / "linked"], {".png"}) == [tmp_path / "linked" / "to" / "a.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: the folder holds no file that ends in \.jpg"):
        list_images([tmp_path / "empty"], {".jpg"})


def test_half_precision_of_cuda_is_single_precision_on_the_cpu(checkpoint, caplog):
    options = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"]
    predictor = samdetr.load(checkpoint[0], device="cpu", options=options)
    assert not predictor.cfg.SOLVER.AMP.ENABLED and "float16 needs CUDA" in caplog.text


def test_images_are_read_when_their_turn_comes(checkpoint):
    predictor, read = samdetr.load(checkpoint[0], device=torch.device("cpu")), []
    with mock.patch.object(predictor.model, "forward", side_effect=lambda batch: read.append(len(taken)) or []):
        taken = []
        predictor((taken.append(i) or photo() for i in range(5)), batch_size=2)
    assert read == [2, 4, 5]


def test_devices_that_are_not_there(checkpoint):
    with pytest.raises(ValueError, match=r"There is no device 'tpu9': use cpu or cuda"):
        samdetr.load(checkpoint[0], device="tpu9")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here"):
            samdetr.load(checkpoint[0], device="cuda")
        with pytest.raises(ValueError, match="no CUDA device here"):
            samdetr.load(checkpoint[0], options=["MODEL.DEVICE", "cuda"])


def test_a_config_with_weights_uses_what_they_carry(checkpoint, tmp_path):
    path, _, cfg = checkpoint
    data = torch.load(path, weights_only=True)
    data["class_names"] = [f"name {i}" for i in range(10)]
    data["average"] = {f"module.{name}": torch.zeros_like(value) for name, value in data["model"].items()}
    torch.save(data, tmp_path / "model.pth")
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS, cfg.SOLVER.EMA.ENABLED = str(tmp_path / "model.pth"), True
    (tmp_path / "config.yaml").write_text(cfg.dump())
    predictor = samdetr.load(tmp_path / "config.yaml", device="cpu")
    assert predictor.class_names[3] == "name 3" and predictor.category_ids == list(range(1, 11))
    assert not any(parameter.any() for parameter in predictor.model.parameters())
    with pytest.raises(UserError, match=r"config\.yaml is a config, and other\.yaml another: name one"):
        samdetr.load(tmp_path / "config.yaml", config_file="other.yaml", device="cpu")


def test_thin_images_keep_a_line(checkpoint):
    predictor = samdetr.load(checkpoint[0], device="cpu")
    assert predictor.prepare(photo(1, 2000))["image"].shape[1] == 1
    assert len(predictor(photo(1, 2000))) > 0


def test_a_shortest_side_of_zero_keeps_the_size(checkpoint):
    predictor = samdetr.load(checkpoint[0], device="cpu", options=["INPUT.MIN_SIZE_TEST", 0])
    image = photo(40, 50)
    assert torch.equal(predictor.prepare(image)["image"], torch.from_numpy(image.transpose(2, 0, 1).copy()))
    size = {
        "shortest_side": 0,
        "longest_side": 128,
        "smallest_side": 32,
        "size_divisibility": 0,
        "channel_order": "RGB",
    }
    assert np.array_equal(prepare(Image.fromarray(image), size), image.transpose(2, 0, 1)[None])


def with_entries(checkpoint, tmp_path, **entries):
    """A copy of a checkpoint with other entries."""
    data = {**torch.load(checkpoint[0], weights_only=True), **entries}
    torch.save(data, tmp_path / "changed.pth")
    return tmp_path / "changed.pth"


def test_a_config_replaces_one_of_another_version(checkpoint, tmp_path):
    path = with_entries(checkpoint, tmp_path, config="MODEL:\n  OLD_KEY: 1\n")
    with pytest.raises(
        UserError, match=r"carries a config of another version of this project .*name a config file that fits"
    ):
        samdetr.load(path, device="cpu")
    (tmp_path / "new.yaml").write_text(checkpoint[2].dump())
    assert len(samdetr.load(path, config_file=tmp_path / "new.yaml", device="cpu")(photo())) == 15


def test_category_ids_of_the_dataset_are_matched_by_name(checkpoint, tmp_path):
    names = [str(digit) for digit in range(10)]
    other = with_entries(checkpoint, tmp_path, class_names=names[::-1], category_ids=None)
    assert samdetr.load(other, device="cpu").category_ids == list(
        range(10, 0, -1)
    )  # those of the embedded dataset: 1 to 10
    unknown = with_entries(checkpoint, tmp_path, class_names=[f"a {name}" for name in names], category_ids=None)
    assert samdetr.load(unknown, device="cpu").category_ids == list(range(10))


def test_a_name_that_detectron2_takes_for_something_else(checkpoint, tmp_path):
    odd = tmp_path / "what?.pth"
    odd.write_bytes(checkpoint[0].read_bytes())
    with pytest.raises(UserError, match=r"what\?\.pth: detectron2 takes .* Rename the file"):
        samdetr.load(odd, device="cpu")


def test_files_may_come_from_an_iterator(tmp_path):
    (tmp_path / "a.png").touch()
    assert list_images(iter([tmp_path]), {".png"}) == [tmp_path / "a.png"]
