"""samdetr.engine.trainer: checkpoints, resuming, averages, the best weights."""

import json
import logging
import os

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from helpers import BEYOND, CONTRASTIVE, load_config, make_input, tiny_config, tiny_model
from samdetr.checkpoint import CheckedCheckpointer, Checkpoint
from samdetr.engine import Trainer
from samdetr.engine.trainer import compare_with_expected, evaluate, freeze_unused_backbone
from samdetr.errors import UserError


def test_settings_that_a_resumed_run_keeps_are_named(tmp_path, caplog):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    trainer = start(trainer_config(tmp_path, "SOLVER.BASE_LR", 1e-5), resume=True)
    assert "SOLVER.BASE_LR was 0.0007 when this checkpoint was written and is now 1e-05" in caplog.text
    assert trainer.scheduler.base_lrs[0] == 0.0007


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


def trainer_config(folder, *options):
    return tiny_config(
        *("OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", 4, "DATALOADER.NUM_WORKERS", 0, "SEED", 5),
        *("SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4,), "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", ()),
        *("DATASETS.TRAIN", ("digits_val_20",), "INPUT.MIN_SIZE_TRAIN", (64,), *CONTRASTIVE, *BEYOND, *options),
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


def test_a_run_ends_when_its_ap_no_longer_rises(tmp_path, monkeypatch, caplog):
    """And ends there again when it is resumed, until it is given more patience; then it is what it would have been."""
    values = {1: 1.0, 2: 3.0, 3: 2.0, 4: 3.0, 5: 2.5, 6: 9.0}  # after each step

    def scripted(trainer):
        return {"bbox": {"AP": values[min(trainer.iter + 1, len(values))]}}

    monkeypatch.setattr(Trainer, "_evaluate", scripted)
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 1, "SOLVER.CHECKPOINT_PERIOD", 100]

    def run(patience, folder="stopped", resume=False):
        return train(trainer_config(tmp_path / folder, *options, "SOLVER.PATIENCE", patience), resume)

    with caplog.at_level(logging.WARNING):
        run(patience=2)
    assert "Training ends after iteration 3 of 6: the last 2 evaluations have not improved" in caplog.text
    assert "final checkpoint" not in caplog.text  # it is written for the first time, and nothing is wrong with it
    final = states(tmp_path / "stopped")
    assert final["trainer"]["iteration"] == 3
    assert torch.load(tmp_path / "stopped" / "model_best.pth", weights_only=True)["metric"] == 3.0
    run(patience=2, resume=True)
    assert_equal_states(states(tmp_path / "stopped"), final)
    run(patience=4, resume=True)
    run(patience=0, folder="whole")
    assert_equal_states(states(tmp_path / "stopped"), states(tmp_path / "whole"))
    assert torch.load(tmp_path / "stopped" / "model_best.pth", weights_only=True)["metric"] == 9.0


def test_patience_is_that_of_a_run_that_was_never_stopped(tmp_path, monkeypatch):
    """A killed run has kept its best weights after the checkpoint that it resumes from, and comes by them again."""
    values = {1: 30.0, 2: 10.0, 3: 20.0, 4: 40.0, 5: 35.0, 6: 36.0, 7: 41.0, 8: 1.0}  # after each step
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer: {"bbox": {"AP": values[min(trainer.iter + 1, 8)]}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 1, "SOLVER.PATIENCE", 3, "SOLVER.MAX_ITER", 8]
    cfg = trainer_config(tmp_path, *options, "SOLVER.CHECKPOINT_PERIOD", 3)
    train_until(start(cfg), 5)
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    assert Checkpoint.read(tmp_path / "model_best.pth").iteration == 3  # counted from 0
    train(cfg, resume=True)
    assert states(tmp_path)["trainer"]["iteration"] == 7
    assert Checkpoint.read(tmp_path / "model_best.pth").metric == 41.0


@pytest.mark.parametrize("results", [{}, {"bbox": {"AP": float("nan")}}])
def test_evaluations_without_an_ap_do_not_end_a_run(results, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer: results)
    cfg = trainer_config(tmp_path, "DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 1, "SOLVER.PATIENCE", 1)
    train(cfg)
    assert states(tmp_path)["trainer"]["iteration"] == cfg.SOLVER.MAX_ITER - 1
    assert not (tmp_path / "model_best.pth").exists()


def test_results_are_compared_with_the_expected_ones():
    cfg = tiny_config("DATASETS.TEST", ("digits_val_20",), "TEST.EXPECTED_RESULTS", [["bbox", "AP", 50.0, 1.0]])
    compare_with_expected(cfg, {"bbox": {"AP": 49.5}})
    with pytest.raises(SystemExit):
        compare_with_expected(cfg, {"bbox": {"AP": 48.5}})
    with pytest.raises(UserError, match=r"TEST\.EXPECTED_RESULTS: digits_val_20 has no annotated objects"):
        compare_with_expected(cfg, {})


def test_an_error_in_the_last_step_is_not_kept_waiting_by_the_final_evaluation(tmp_path, monkeypatch):
    """Other processes would wait in the step, and this one in the evaluation."""
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer: pytest.fail("evaluated"))
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 100]
    trainer = start(trainer_config(tmp_path, *options))
    run_step = trainer.run_step

    def fail():
        if trainer.iter == trainer.max_iter - 1:
            raise UserError("an image is unreadable")
        run_step()

    monkeypatch.setattr(trainer, "run_step", fail)
    with pytest.raises(UserError, match="unreadable"):
        trainer.train()


def test_patience_counts_evaluations_on_the_same_data_however_often_a_run_is_resumed(tmp_path, monkeypatch):
    scores = iter([80.0, 81.0, 82.0, 30.0, 31.0, 32.0, 33.0, 34.0])
    monkeypatch.setattr(Trainer, "_evaluate", lambda trainer: {"bbox": {"AP": next(scores)}})
    options = ["TEST.EVAL_PERIOD", 1, "SOLVER.PATIENCE", 2, "SOLVER.MAX_ITER", 8, "SOLVER.CHECKPOINT_PERIOD", 1]
    for end, dataset in ((3, "digits_val_20"), (6, "digits_val"), (8, "digits_val")):
        cfg = trainer_config(tmp_path, *options, "DATASETS.TEST", (dataset,))
        stopped = start(cfg, resume=end > 3)
        stopped.cfg.defrost()
        train_until(stopped, end)
        for name in ("model_final.pth",):
            if end < 8:
                (tmp_path / name).unlink(missing_ok=True)
                (tmp_path / "last_checkpoint").write_text(f"model_{end - 1:07d}.pth")
    assert states(tmp_path)["trainer"]["iteration"] == 7


def test_a_step_of_the_schedule_at_the_end_or_later_is_left_out(tmp_path, caplog):
    trainer = Trainer(
        trainer_config(tmp_path, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", (4, 6, 9))
    )
    assert "SOLVER.STEPS is (4, 6, 9): the learning rate does not fall at SOLVER.MAX_ITER (6)" in caplog.text
    multiplier = trainer.scheduler._multiplier
    assert [round(multiplier(step / 6), 6) for step in (3, 4, 5)] == [1.0, 0.1, 0.1]


def test_epochs_set_the_length_of_run_and_schedule(tmp_path):
    cfg = trainer_config(
        tmp_path, "SOLVER.EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 5, "SOLVER.STEPS", (3,), "SOLVER.MAX_ITER", 6
    )
    trainer = Trainer(cfg)
    assert trainer.max_iter == trainer.cfg.SOLVER.MAX_ITER == 4 and trainer.cfg.SOLVER.STEPS == (2,)


def test_the_end_without_augmentation_is_scaled_with_the_other_lengths(tmp_path):
    options = ["SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 8, "INPUT.AUGMENTATION_OFF_ITERS", 2]
    cfg = Trainer(trainer_config(tmp_path, *options)).cfg
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.INPUT.AUGMENTATION_OFF_ITERS) == (12, (8,), 4)


def test_periods_do_not_become_zero_with_many_processes(tmp_path):
    cfg = trainer_config(tmp_path, "SOLVER.REFERENCE_WORLD_SIZE", 1, "TEST.EVAL_PERIOD", 3)
    scaled = Trainer.auto_scale_workers(cfg, 16)
    assert (scaled.SOLVER.CHECKPOINT_PERIOD, scaled.TEST.EVAL_PERIOD) == (1, 1)
    cfg.TEST.EVAL_PERIOD = 0
    assert Trainer.auto_scale_workers(cfg, 16).TEST.EVAL_PERIOD == 0


def test_an_average_that_begins_with_a_resumed_run_begins_with_its_weights(tmp_path):
    """Also where the run is complete, and only evaluated again."""
    finished = train(trainer_config(tmp_path))
    resumed = start(trainer_config(tmp_path, *EMA), resume=True)
    assert_equal_states(resumed.evaluated_model.state_dict(), finished.inner_model.state_dict())


@pytest.mark.parametrize("changes", [("MODEL.BACKBONE.FREEZE_AT", 2), ("SOLVER.BIAS_LR_FACTOR", 2.0)])
def test_what_groups_parameters_in_another_way_cannot_change_in_a_run(changes, tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    with pytest.raises(
        UserError, match=r"set MODEL\.BACKBONE\.FREEZE_AT, .*BIAS_LR_FACTOR.* as config\.yaml in OUTPUT_DIR has"
    ):
        start(trainer_config(tmp_path, *changes), resume=True)


def test_a_cosine_goes_over_the_epochs_after_a_warm_up(tmp_path):
    cfg = trainer_config(
        *(tmp_path, "SOLVER.EPOCHS", 20, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        *("SOLVER.MAX_ITER", 10, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 1, "SOLVER.BASE_LR_END", 0.0),
    )
    trainer = Trainer(cfg)
    multiplier = trainer.scheduler._multiplier
    assert trainer.max_iter == 100 and trainer.cfg.SOLVER.WARMUP_ITERS == 10
    rates = [multiplier(step / 100) for step in (0, 5, 10, 50, 75, 99)]
    assert rates == pytest.approx([0.01, 0.5, 0.976, 0.5, 0.146, 0.0], abs=0.02)


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


def test_the_best_weights_alone_are_no_run_to_resume_and_stay(tmp_path):
    CheckedCheckpointer(tiny_model(), str(tmp_path), complete=False).save("model_best", tag=False)
    before = (tmp_path / "model_best.pth").read_bytes()
    with pytest.raises(UserError, match=r"holds model_best\.pth, but no checkpoint from which training can go on"):
        train(trainer_config(tmp_path), resume=True)
    assert (tmp_path / "model_best.pth").read_bytes() == before


@pytest.mark.parametrize("what", ["build_evaluator", "test"])
def test_an_evaluation_that_fails_loses_no_step(what, tmp_path, monkeypatch):
    """Checkpoints and evaluations need not come together."""
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 3, "SOLVER.CHECKPOINT_PERIOD", 4]
    with monkeypatch.context() as context:
        trainer = start(trainer_config(tmp_path / "failed", *options))
        context.setattr(Trainer, what, classmethod(lambda cls, *_: (_ for _ in ()).throw(UserError("no image"))))
        with pytest.raises(UserError, match="no image"):
            trainer.train()
    assert (tmp_path / "failed" / "last_checkpoint").read_text() == "model_0000002.pth"
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, *_: {"bbox": {"AP": 12.0}}))
    train(trainer_config(tmp_path / "failed", *options), resume=True)
    train(trainer_config(tmp_path / "whole", *options))
    assert_equal_states(states(tmp_path / "whole"), states(tmp_path / "failed"))


def test_the_best_of_another_evaluation_is_kept_and_not_compared(tmp_path, monkeypatch, caplog):
    remaining = iter((30.0, 20.0, 10.0))
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": next(remaining)}})
    train_until(start(trainer_config(tmp_path, "DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2)), 4)
    train(trainer_config(tmp_path, "DATASETS.TEST", ("digits_val",), "TEST.EVAL_PERIOD", 2), resume=True)
    assert "was the best on digits_val_20, not on digits_val: it is now model_best_digits_val_20.pth" in caplog.text
    metrics = [Checkpoint.read(tmp_path / name).metric for name in ("model_best_digits_val_20.pth", "model_best.pth")]
    assert metrics == [30.0, 10.0]


def test_the_best_weights_that_were_set_aside_are_not_replaced(tmp_path, monkeypatch):
    scores = iter((30.0, 20.0, 10.0, 5.0))
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": next(scores)}})
    for end in (2, 4, 6, 8):
        name = "digits_val_20" if end in (2, 6) else "digits_val"
        options = ["SOLVER.MAX_ITER", 8, "DATASETS.TEST", (name,), "TEST.EVAL_PERIOD", 2]
        train_until(start(trainer_config(tmp_path, *options), resume=end > 2), end)
    found = {path.stem: Checkpoint.read(path).metric for path in tmp_path.glob("model_best*")}
    names = ["model_best_digits_val_20", "model_best_digits_val", "model_best_digits_val_20_2", "model_best"]
    assert found == dict(zip(names, (30.0, 20.0, 10.0, 5.0)))


def test_the_best_of_another_version_stays(tmp_path, monkeypatch):
    remaining = iter((30.0, 20.0, 10.0))
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": next(remaining)}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2]
    train_until(start(trainer_config(tmp_path, *options)), 4)
    data = torch.load(tmp_path / "model_best.pth", weights_only=True)
    data["config"] = data["config"].replace("POOLED_SIZE", "POOLED_SIZE_OF_OLD")
    torch.save(data, tmp_path / "model_best.pth")
    train(trainer_config(tmp_path, *options), resume=True)
    assert Checkpoint.read(tmp_path / "model_best.pth").metric == 30.0


def test_detections_of_several_datasets_are_in_folders_of_their_own(tmp_path):
    options = ["DATASETS.TEST", ("digits_val_20", "digits_val"), "OUTPUT_DIR", str(tmp_path)]
    folders = [Trainer.build_evaluator(tiny_config(*options), name)._output_dir for name in options[1]]
    assert folders == [str(tmp_path / "inference" / name) for name in options[1]]
    (name,) = options[1] = ("digits_val_20",)
    assert Trainer.build_evaluator(tiny_config(*options), name)._output_dir == str(tmp_path / "inference")


@pytest.mark.parametrize("known", [True, False])
def test_weights_without_class_names_have_those_of_the_training_data(known, tmp_path, monkeypatch, caplog):
    record = {"file_name": "1.png", "image_id": 1, "height": 9, "width": 9, "annotations": []}
    names = {"trained_on": list("abcdefghij") if known else list("ab"), "tested_on": list("jihgfedcba")}
    evaluators = []
    monkeypatch.setattr(Trainer, "test", classmethod(lambda cls, cfg, model, built: evaluators.extend(built) or {}))
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "bare.pth")
    options = ["DATASETS.TRAIN", ("trained_on",), "DATASETS.TEST", ("tested_on",), "OUTPUT_DIR", str(tmp_path)]
    try:
        for name, classes in names.items():
            DatasetCatalog.register(name, lambda: [record])
            MetadataCatalog.get(name).thing_classes = classes
        evaluate(tiny_config(*options, "MODEL.WEIGHTS", str(tmp_path / "bare.pth")))
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    ids = evaluators[0]._metadata.thing_dataset_id_to_contiguous_id
    assert ids == {index: 9 - index if known else index for index in range(10)}
    assert ("does not say which classes it has" in caplog.text) is not known


def test_a_checkpoint_of_another_trainer_is_not_resumed(tmp_path):
    trainer = start(trainer_config(tmp_path))
    torch.save({"model": trainer.inner_model.state_dict(), "trainer": {"iteration": 1}}, tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="was written by another trainer"):
        start(trainer_config(tmp_path), resume=True)


def test_resuming_a_run_of_another_architecture_is_refused(tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    with pytest.raises(UserError, match="of another architecture than the config"):
        train(trainer_config(tmp_path, "MODEL.SAMDETR.DECODER.FEEDFORWARD_DIM", 50), resume=True)


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
        history.append(trainer.inner_model.query_generator.label_embedding.weight.detach().clone())

    trainer._trainer.run_step = recorded
    trainer.train()
    counts = [0.9**age for age in reversed(range(len(history)))]
    expected = sum(count * value for count, value in zip(counts, history)) / sum(counts)
    average = trainer.evaluated_model.query_generator.label_embedding.weight
    assert torch.allclose(average, expected, atol=1e-6) and not torch.allclose(average, history[-1])
    model = tiny_model(*CONTRASTIVE, *BEYOND)
    CheckedCheckpointer(model, complete=True, use_average=True).load(str(tmp_path / "model_final.pth"))
    assert torch.equal(model.query_generator.label_embedding.weight, average)


def test_a_damaged_best_checkpoint_does_not_end_a_resumed_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": 12.0}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2]
    train_until(start(trainer_config(tmp_path, *options)), 4)
    (tmp_path / "model_best.pth").write_bytes(b"half")
    train(trainer_config(tmp_path, *options), resume=True)
    assert "model_best.pth is truncated, damaged or not a checkpoint" in caplog.text
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["metric"] == 12.0


@pytest.mark.parametrize("scores", [(30.0, 20.0, 25.0, 10.0), (0.0, 0.0, 0.0, 0.0)])
def test_the_best_weights_are_remembered_when_a_run_is_resumed(tmp_path, monkeypatch, scores):
    remaining = iter(scores)
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": next(remaining)}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2]
    train_until(start(trainer_config(tmp_path, *options)), 4)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["metric"], best["iteration"]) == (scores[0], 1)
    assert set(best) == {"model", "metric", "iteration", "config", "class_names", "category_ids"}
    train(trainer_config(tmp_path, *options), resume=True)
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["metric"], best["iteration"]) == (scores[0], 1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("final", ["missing", "damaged"])
def test_a_complete_run_without_a_good_final_checkpoint_writes_it(tmp_path, final):
    options = ["SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,), "SOLVER.CHECKPOINT_PERIOD", 4]
    whole = train(trainer_config(tmp_path, *options))
    path = tmp_path / "model_final.pth"
    path.unlink() if final == "missing" else path.write_bytes(path.read_bytes()[:-100])
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    train(trainer_config(tmp_path, *options), resume=True)
    written = Checkpoint.read(path)
    assert written.iteration == 3
    assert all(torch.equal(written.weights[name], value) for name, value in whole.inner_model.state_dict().items())
    before = path.stat().st_mtime_ns
    train(trainer_config(tmp_path, *options), resume=True)  # it is good: it stays
    assert path.stat().st_mtime_ns == before


def test_metrics_name_every_iteration_once_however_often_a_run_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": 12.0}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 3]
    train(trainer_config(tmp_path / "whole", *options))
    train_until(start(trainer_config(tmp_path / "stopped", *options)), 5)
    for _ in range(3):
        train(trainer_config(tmp_path / "stopped", *options), resume=True)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.json").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    iterations = [[line["iteration"] for line in found] for found in lines]
    assert len(set(iterations[1])) == len(iterations[1])
    assert set(iterations[1]) == {*iterations[0], 4}  # the last before the stop is written as well


def test_resuming_with_other_classes_is_refused(tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    data["class_names"] = data["class_names"][::-1]
    torch.save(data, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"trained on other classes, or in another order, .* \(class 0 differs\)"):
        train(trainer_config(tmp_path), resume=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda trainer: trainer.update(seed="3"),
        lambda trainer: trainer.pop("_trainer"),
        lambda trainer: trainer["_trainer"].update(optimizer={}),
        lambda trainer: trainer["_trainer"]["optimizer"]["state"][0].update(exp_avg=torch.ones(1, 2)),
        lambda trainer: trainer["_trainer"].update(unreadable=3),
    ],
)
def test_training_states_that_cannot_be_used_are_refused(damage, tmp_path):
    train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,)))
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    damage(data["trainer"])
    torch.save(data, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"model_final\.pth cannot be loaded \(.*it is damaged, or of another program"):
        train(trainer_config(tmp_path), resume=True)


def test_a_checkpoint_without_training_state_is_not_resumed(tmp_path):
    """It would start again at the first step, and write over the later checkpoints."""
    train(trainer_config(tmp_path))
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    torch.save({key: data[key] for key in ("model", "iteration")}, tmp_path / "model_final.pth")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    with pytest.raises(UserError, match=r"model_final\.pth holds no training state, as model_best\.pth does not"):
        train(trainer_config(tmp_path), resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}.items() >= before.items()


def test_states_that_do_not_belong_together_are_not_resumed(tmp_path):
    train(trainer_config(tmp_path))
    data = torch.load(tmp_path / "model_final.pth", weights_only=True)
    torch.save({**data, "iteration": 3}, tmp_path / "model_final.pth")
    with pytest.raises(UserError, match=r"is of iteration 3, but its training state of 5"):
        train(trainer_config(tmp_path), resume=True)


def test_fewer_steps_than_a_run_has_are_refused(tmp_path):
    train(trainer_config(tmp_path))
    with pytest.raises(UserError, match=r"MAX_ITER is 4, but .*model_final\.pth has 6 steps already"):
        train(trainer_config(tmp_path, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,)), resume=True)


@pytest.mark.parametrize("metric", [float("nan"), float("inf")])
def test_a_best_ap_that_is_none_is_replaced(metric, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {"bbox": {"AP": 12.0}})
    options = ["DATASETS.TEST", ("digits_val_20",), "TEST.EVAL_PERIOD", 2]
    train_until(start(trainer_config(tmp_path, *options)), 4)
    data = torch.load(tmp_path / "model_best.pth", weights_only=True)
    torch.save({**data, "metric": metric}, tmp_path / "model_best.pth")
    train(trainer_config(tmp_path, *options), resume=True)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["metric"] == 12.0
