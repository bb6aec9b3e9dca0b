"""Weights & Biases and MLflow: what arrives there, that a resumed run goes on there, and that a failure costs nothing."""

import json
import logging

import pytest
import torch
from detectron2.utils.events import EventStorage

from helpers import tiny_config
from samdetr.engine import Trainer
from samdetr.engine.tracking import MLflowWriter, TrackingWriter, WandbWriter, build_trackers, import_trackers
from samdetr.errors import UserError


def config(folder, *options):
    return tiny_config("OUTPUT_DIR", str(folder), *options)


def write_steps(writer, steps):
    """Write the losses of some steps, and an AP at the last one."""
    with EventStorage(steps[0]) as storage:
        for step in steps:
            storage.iter = step
            storage.put_scalars(total_loss=float(step), smoothing_hint=False)
        storage.put_scalar("bbox/AP", 10.0 + steps[-1], smoothing_hint=False)
        storage.put_scalar("bbox/AP-a class, (odd)", 1.0, smoothing_hint=False)
        writer.write()
        writer.write()  # nothing new
    writer.close()


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    """MLflow with a file store."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    yield mlflow
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def test_mlflow_gets_metrics_and_config_and_a_resumed_run_goes_on(mlflow, tmp_path):
    cfg = config(tmp_path, "TRACKING.MLFLOW_EXPERIMENT", "cells", "TRACKING.RUN_NAME", "first try")
    (writer,) = build_trackers(cfg)
    write_steps(writer, [0, 19])
    write_steps(MLflowWriter(cfg), [20, 39])
    (run,) = mlflow.search_runs(experiment_names=["cells"], output_format="list")
    assert run.info.run_name == "first try" and run.info.status == "FINISHED"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "total_loss")
    assert [(point.step, point.value) for point in history] == [(19, 19.0), (39, 39.0)]
    assert run.data.metrics["bbox/AP"] == 49.0 and run.data.metrics["bbox/AP-a class_ _odd_"] == 1.0
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.yaml") == cfg.dump()
    assert run.data.params["max_iter"] == str(cfg.SOLVER.MAX_ITER)


def test_wandb_works_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config(tmp_path, "TRACKING.WANDB_PROJECT", "cells")
    (writer,) = build_trackers(cfg)
    assert writer.works
    write_steps(writer, [0, 19])
    assert writer.run.config["SOLVER"]["MAX_ITER"] == cfg.SOLVER.MAX_ITER
    again = WandbWriter(cfg)
    write_steps(again, [20, 39])
    assert again.run.id == writer.run.id
    wandb.teardown()  # its process has written everything
    first, second = (file.read_bytes() for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    assert b"total_loss" in first and b"bbox/AP" in first and b"29" in first
    assert b"total_loss" in second and b"49" in second


class Broken(TrackingWriter):
    """A tracker that cannot be reached from its second call on."""

    def __init__(self, cfg):
        self.calls = []
        super().__init__(cfg, "Broken")

    def _begin(self, cfg):
        self.calls.append("begin")

    def _send(self, metrics, step):
        self.calls.append(step)
        raise ConnectionError("no\nnetwork")

    def _end(self):
        self.calls.append("end")


def test_a_tracker_that_cannot_be_reached_is_left_alone(tmp_path, caplog):
    writer = Broken(config(tmp_path))
    with caplog.at_level(logging.WARNING):
        write_steps(writer, [0, 19])
    assert writer.calls == ["begin", 19]
    assert [record.getMessage() for record in caplog.records] == [
        "Broken does not work (ConnectionError: no network). This run goes on without it; its metrics are in "
        f"{tmp_path / 'metrics.json'}."
    ]


def test_a_missing_package_is_named_before_the_start(monkeypatch, tmp_path):
    import sys

    for module, key, package in (("wandb", "WANDB_PROJECT", "wandb"), ("mlflow", "MLFLOW_EXPERIMENT", "mlflow-skinny")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=f"pip install {package}"):
            import_trackers(config(tmp_path, f"TRACKING.{key}", "x"))
    import_trackers(config(tmp_path))
    assert build_trackers(config(tmp_path)) == []


@pytest.mark.slow
def test_training_sends_its_metrics(mlflow, tmp_path):
    options = ["TRACKING.MLFLOW_EXPERIMENT", "run", "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "DATASETS.TEST", ()]
    trainer = Trainer(config(tmp_path, *options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    (run,) = mlflow.search_runs(experiment_names=["run"], output_format="list")
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert run.data.metrics["total_loss"] == pytest.approx(lines[-1]["total_loss"])
    assert torch.isfinite(torch.tensor(run.data.metrics["total_loss"]))
