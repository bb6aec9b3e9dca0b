"""samdetr.engine: accumulation, precision, averages, bad numbers, checkpoints."""

import copy
import logging
import math
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import DN, MULTI_SCALE, SMCA, load_config, make_input, tiny_config, tiny_model
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from samdetr.checkpoint import CheckedCheckpointer
from samdetr.engine import Trainer
from samdetr.engine.train_step import TrainStep, step_seed
from samdetr.engine.trainer import freeze_unused_backbone
from samdetr.errors import UserError

BATCH = [
    make_input(64, 64, [(10, 12, 40, 50), (30, 5, 62, 33)], [3, 7], file_name="a.jpg"),
    make_input(64, 64, [(0, 0, 20, 20)], [1], seed=1, file_name="b.jpg"),
    make_input(64, 64, seed=2, file_name="c.jpg"),
    make_input(64, 64, [(5, 5, 30, 40), (1, 1, 9, 9), (20, 20, 40, 44)], [2, 2, 9], seed=3, file_name="d.jpg"),
]


class Batches:
    """A loader that yields one batch again and again."""

    batch_sampler = SimpleNamespace(seed=7)

    def __init__(self, batch):
        self.batch = batch

    def __iter__(self):
        while True:
            yield copy.deepcopy(self.batch)


def make_step(model, batch, *options):
    cfg = tiny_config(*options)
    return TrainStep(cfg, model, Batches(batch), torch.optim.SGD(model.parameters(), lr=1e-3))


def frozen_statistics(model):
    """Without BatchNorm's batch statistics, which parts of a batch cannot have in common."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module
    return model


def run(step, iterations=1):
    with EventStorage() as storage:
        for step.iter in range(iterations):
            step.run_step()
        return {name: value for name, (value, _) in storage.latest().items()}


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    """Parts with and without boxes; all of one size, so that padding at the border does not depend on the part."""
    whole = frozen_statistics(tiny_model(*SMCA))
    accumulated = copy.deepcopy(whole)
    expected = run(make_step(whole, BATCH))
    found = run(make_step(accumulated, BATCH, "SOLVER.ACCUMULATION_STEPS", parts))
    for name in ("total_loss", "loss_class", "loss_giou_0"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    for (name, a), b in zip(whole.named_parameters(), accumulated.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * a.grad.abs().max().clamp(min=1e-3)), name


def test_denoising_losses_are_normalised_by_the_whole_batch():
    model = tiny_model(*DN)
    normalizers = model.loss_normalizers([BATCH[:2], BATCH[2:]])
    assert normalizers.tolist() == [6, 5 * 6]
    part = model(BATCH[:1], normalizers=normalizers)
    torch.manual_seed(0)
    alone = model(BATCH[:1])
    assert part["loss_l1"].item() == pytest.approx(alone["loss_l1"].item() * 2 / 6, rel=1e-4)


@pytest.mark.parametrize("options", [SMCA, [*SMCA, *DN, *MULTI_SCALE]], ids=["single-scale", "multi-scale"])
def test_bfloat16_trains_and_stays_close_to_float32(options):
    full = tiny_model(*options)
    half = copy.deepcopy(full)
    expected = run(make_step(full, BATCH, *options))
    found = run(make_step(half, BATCH, *options, "SOLVER.AMP.ENABLED", True))
    assert found["total_loss"] == pytest.approx(expected["total_loss"], rel=0.03)
    assert found["total_loss"] != expected["total_loss"]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in half.parameters())


def test_what_needs_float32_keeps_it_in_mixed_precision():
    model = tiny_model(*SMCA, *MULTI_SCALE).eval()
    seen = {}
    layer = model.decoder.layers[0]
    layer.cross_attention.register_forward_pre_hook(lambda module, args: seen.update(aligned=args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model.predict([make_input(64, 64)])
    assert out["pred_boxes"].dtype == out["pred_logits"].dtype == torch.float32
    assert seen["aligned"].keypoints.dtype == seen["aligned"].gaussian_scales.dtype == torch.float32
    assert seen["aligned"].content.dtype == torch.bfloat16


@pytest.mark.parametrize("options", [[], MULTI_SCALE], ids=["single-scale", "multi-scale"])
def test_activation_checkpointing_changes_nothing_but_what_is_kept(options):
    plain = frozen_statistics(tiny_model(*options))
    recomputing = frozen_statistics(tiny_model(*options, "MODEL.SAMDETR.ACTIVATION_CHECKPOINTING", True))
    recomputing.load_state_dict(plain.state_dict())
    kept = {}
    for name, model in (("plain", plain), ("recomputing", recomputing)):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = sum(model(BATCH).values())
        kept[name] = sum(sizes)
        loss.backward()
    assert kept["recomputing"] < 0.6 * kept["plain"]
    for a, b in zip(plain.parameters(), recomputing.parameters()):
        assert torch.equal(a.grad, b.grad)


def poisoned(name):
    batch = copy.deepcopy(BATCH)
    for inputs in batch:
        if inputs["file_name"] == name:
            inputs["image"][:] = math.nan
    return batch


def test_numbers_that_are_not_finite_stop_with_the_images():
    with pytest.raises(FloatingPointError, match=r"b\.jpg"):
        run(make_step(frozen_statistics(tiny_model()), poisoned("b.jpg")))
    step = make_step(tiny_model(), BATCH)
    step.model.decoder.box_heads[0].layers[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"Iteration 0: .*gradient norm nan; .*loss_l1 .*a\.jpg, b\.jpg"):
        run(step)


def test_steps_that_are_not_finite_are_left_out_on_demand(caplog):
    options = ["SOLVER.NON_FINITE", "skip"]
    model = tiny_model(*options)  # with BatchNorm, whose running statistics must not keep the NaN either
    before = copy.deepcopy(model.state_dict())
    step = make_step(model, poisoned("b.jpg"), *options)
    with caplog.at_level(logging.WARNING):
        run(step, 2)
    assert "Iteration 1: a loss or gradient is not finite" in caplog.text and "b.jpg" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    step.data_loader.batch = BATCH
    step._data_loader_iter_obj = None
    run(step)
    assert step.skips_in_a_row == 0
    assert not torch.equal(before["query_generator.reference_logits"], model.query_generator.reference_logits)


def test_float16_overflow_that_never_ends_stops():
    """The loss scaler leaves out steps while it looks for a scale; below a scale of 1 something else is wrong."""
    step = make_step(tiny_model(), BATCH, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16")
    step.model.decoder.box_heads[0].layers[0].weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match=r"gradient norm nan.*a\.jpg"):
        run(step, 40)
    assert step.iter == 17  # 2 ** 16, halved until it is below 1


def test_float16_trains_and_its_scale_is_resumed():
    options = [*SMCA, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "float16"]
    step = make_step(tiny_model(*SMCA), BATCH, *options)
    before = copy.deepcopy(step.model.state_dict())
    run(step, 3)
    assert not torch.equal(before["query_generator.reference_logits"], step.model.query_generator.reference_logits)
    state = step.state_dict()
    assert state["scaler"]["_growth_tracker"] > 0
    state["scaler"]["scale"] = 123.0
    resumed = make_step(tiny_model(*SMCA), BATCH, *options)
    resumed.iter = 0
    resumed.load_state_dict(state)
    assert resumed.scaler.get_scale() == 123.0


def test_bfloat16_leaves_padding_out():
    model = tiny_model(*SMCA, *MULTI_SCALE).eval()
    small, large = make_input(64, 64, seed=1), make_input(96, 128, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        together, alone = model.predict([small, large]), model.predict([small])
    assert together["pred_logits"].isfinite().all()
    assert (together["pred_boxes"][:, :1] - alone["pred_boxes"]).abs().mean() < 0.02


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


def test_settings_that_a_resumed_run_keeps_are_named(tmp_path, caplog):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    trainer = start(trainer_config(tmp_path, "SOLVER.BASE_LR", 1e-5), resume=True)
    assert "SOLVER.BASE_LR was 0.0007 when this checkpoint was written and is now 1e-05" in caplog.text
    assert trainer.scheduler.base_lrs[0] == 0.0007


def test_more_parts_than_images_a_process_are_refused_in_words():
    with pytest.raises(UserError, match="more than the 4 images that each process has"):
        run(make_step(tiny_model(), BATCH, "SOLVER.ACCUMULATION_STEPS", 6))


def test_skipping_without_end_stops():
    options = ["SOLVER.NON_FINITE", "skip"]
    step = make_step(frozen_statistics(tiny_model(*options)), poisoned("b.jpg")[1:2], *options)
    step.skips_in_a_row = 100
    with pytest.raises(FloatingPointError, match="not finite"):
        run(step)


def test_unreadable_images_are_counted_up_to_a_limit(caplog):
    batch = [{**inputs, "unreadable_files": ["x.jpg", "y.jpg"]} for inputs in BATCH]
    skip = ["DATALOADER.UNREADABLE_IMAGES", "skip"]
    step = make_step(tiny_model(), batch, *skip)
    assert run(step, 2)["unreadable_images"] == 2
    assert "Images that cannot be used: 2 until now, new: x.jpg, y.jpg" in caplog.text
    with pytest.raises(RuntimeError, match=r"2 images cannot be used, more than .*MAX_UNREADABLE_IMAGES \(1\)"):
        run(make_step(tiny_model(), batch, *skip, "DATALOADER.MAX_UNREADABLE_IMAGES", 1))


def test_unused_parts_of_the_backbone_are_frozen_and_named(caplog):
    """An FPN's level that nobody reads; DistributedDataParallel would wait for its gradients."""
    model = build_model(
        load_config(
            *("sam_detr_pp_R_50_1x", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.SAMDETR.DECODER.NUM_LAYERS", 1),
            *("MODEL.SAMDETR.IN_FEATURES", ["p3", "p4", "p5"], "MODEL.SAMDETR.ENCODER.NUM_LAYERS", 1),
        )
    )
    freeze_unused_backbone(model)
    assert "fpn_lateral2.weight" in caplog.text and "fpn_lateral3.weight" not in caplog.text
    sum(model([make_input(64, 64, [(1, 1, 30, 30)], [3])]).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_steps_have_random_numbers_of_their_own():
    assert len({step_seed(seed, i, rank) for seed in range(3) for i in range(5) for rank in range(2)}) == 30


def trainer_config(folder, *options):
    return tiny_config(
        *("OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "SEED", 5),
        *("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()),
        *("INPUT.MIN_SIZE_TRAIN", (64,), *DN, *options),
    )


def start(cfg, resume=False):
    """A trainer as train_net.py makes it."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    seed_all_rng(cfg.SEED if not resume else None)  # a resumed run must not depend on it
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def train(cfg, resume=False):
    trainer = start(cfg, resume)
    trainer.train()
    return trainer


def train_until(trainer, iteration):
    """As if the run was stopped there: the schedule stays that of the whole run."""
    trainer.max_iter = iteration
    trainer.train()


def states(folder, name="model_final.pth"):
    state = torch.load(os.path.join(folder, name), weights_only=True)
    return {key: state[key] for key in ("model", "average", "trainer") if key in state}


def assert_equal_states(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal_states(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal_states(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


EMA = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.9]


@pytest.mark.parametrize("damage", ["none", "truncated", "half-written"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(damage, tmp_path, caplog):
    """Model, optimizer, schedule, average, order of the data, augmentation and denoising noise, bit for bit."""
    train(trainer_config(tmp_path / "whole", *EMA))
    stopped = trainer_config(tmp_path / "stopped", *EMA)
    train_until(start(stopped), 4)
    files = sorted(path.name for path in (tmp_path / "stopped").glob("*.pth"))
    assert files == ["model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    (tmp_path / "stopped" / "model_final.pth").unlink()
    newest = tmp_path / "stopped" / "model_0000003.pth"
    (tmp_path / "stopped" / "last_checkpoint").write_text(newest.name)
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:1000])
    elif damage == "half-written":
        newest.rename(f"{newest}.part")
    with caplog.at_level(logging.INFO):
        train(stopped, resume=True)
    expected = "model_0000003.pth" if damage == "none" else "model_0000001.pth"
    assert f"Resuming from {tmp_path / 'stopped' / expected}" in caplog.text
    assert_equal_states(states(tmp_path / "whole"), states(tmp_path / "stopped"))


def test_no_readable_checkpoint_is_an_error_and_not_a_new_start(tmp_path):
    (tmp_path / "model_0000001.pth").write_bytes(b"half")
    with pytest.raises(UserError, match=r"None of the checkpoints in .* can be read"):
        train(trainer_config(tmp_path), resume=True)


def test_a_checkpoint_of_another_trainer_is_not_resumed(tmp_path):
    trainer = start(trainer_config(tmp_path))
    torch.save({"model": trainer.inner_model.state_dict(), "trainer": {"iteration": 1}}, tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="was written by another trainer"):
        start(trainer_config(tmp_path), resume=True)


def test_resuming_a_run_of_another_architecture_is_refused(tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    with pytest.raises(UserError, match="of another architecture than the config"):
        train(trainer_config(tmp_path, "MODEL.SAMDETR.NUM_QUERIES", 5), resume=True)


def test_resuming_with_another_optimizer_is_refused(tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    with pytest.raises(UserError, match=r"SOLVER\.OPTIMIZER is 'SGD', but the checkpoint .* was trained with 'AdamW'"):
        train(trainer_config(tmp_path, "SOLVER.OPTIMIZER", "SGD"), resume=True)


def test_a_seeded_run_repeats_itself_for_any_number_of_workers(tmp_path):
    first = train(trainer_config(tmp_path / "a", "SOLVER.MAX_ITER", 3))
    second = train(trainer_config(tmp_path / "b", "SOLVER.MAX_ITER", 3, "DATALOADER.NUM_WORKERS", 2))
    for (name, a), b in zip(first.model.state_dict().items(), second.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_average_follows_its_formula_and_is_what_is_evaluated(tmp_path):
    cfg = trainer_config(tmp_path, *EMA)
    trainer = start(cfg)
    history = []
    step = trainer._trainer.run_step

    def recorded():
        step()
        history.append(trainer.inner_model.query_generator.reference_logits.detach().clone())

    trainer._trainer.run_step = recorded
    trainer.train()
    expected = history[0]
    for value in history[1:]:
        expected = 0.9 * expected + 0.1 * value
    average = trainer.evaluated_model.query_generator.reference_logits
    assert torch.allclose(average, expected, atol=1e-6) and not torch.allclose(average, history[-1])
    model = tiny_model(*DN)
    CheckedCheckpointer(model, complete=True, use_average=True).load(str(tmp_path / "model_final.pth"))
    assert torch.equal(model.query_generator.reference_logits, average)


def test_the_best_weights_are_remembered_when_a_run_is_resumed(tmp_path, monkeypatch):
    scores = iter([30.0, 20.0, 25.0, 10.0])
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": next(scores)}})
    options = ["DATASETS.TEST", ("digits_val",), "TEST.EVAL_PERIOD", 2]
    train_until(start(trainer_config(tmp_path, *options)), 4)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["metric"], best["iteration"]) == (30.0, 1)
    assert set(best) == {"model", "metric", "iteration", "config", "class_names", "category_ids"}
    train(trainer_config(tmp_path, *options), resume=True)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["metric"] == 30.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
