"""train_net.py as a user runs it: train, evaluate, resume, and mistakes."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, subprocess_environment

CONFIG = ["--config-file", str(ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml")]


def train_net(*arguments):
    command = [sys.executable, str(ROOT / "train_net.py"), *CONFIG, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=subprocess_environment(), timeout=300)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def ap_of(result):
    """The last AP that a run printed."""
    return re.findall(r"copypaste: ([\d.]+|nan),", result.stdout + result.stderr)[-1]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = train_net("OUTPUT_DIR", folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result


@pytest.mark.slow
def test_training_writes_checkpoints_metrics_and_logs(finished_run):
    folder, result = finished_run
    names = {path.name for path in folder.iterdir()}
    assert {"model_0000002.pth", "model_final.pth", "model_best.pth", "config.yaml", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    last = metrics_of(folder)[-1]  # detectron2 writes the final evaluation after the sixth step
    assert last["iteration"] == 6 and "bbox/AP" in last and last["total_loss"] > 0
    assert "eta: " in result.stdout + result.stderr
    assert set(torch.load(folder / "model_best.pth", weights_only=True)) == {"model", "iteration"}


@pytest.mark.slow
def test_eval_only_gives_the_reported_ap(finished_run, tmp_path):
    folder, trained = finished_run
    evaluated = train_net("--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert ap_of(evaluated) == ap_of(trained)


@pytest.mark.slow
def test_resume_goes_on_where_training_stopped(finished_run, tmp_path):
    """A run stopped after three of six steps and resumed makes the remaining steps, and keeps its first metrics."""
    first = train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3)
    assert first.returncode == 0, first.stderr[-3000:]
    before = metrics_of(tmp_path)
    second = train_net("--resume", "OUTPUT_DIR", tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Starting training from iteration 3" in second.stdout + second.stderr
    metrics = metrics_of(tmp_path)
    assert metrics[: len(before)] == before and metrics[-1]["iteration"] == 6
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 5
    optimizer = state["trainer"]["_trainer"]["optimizer"]
    assert all(entry["step"] == 6 for entry in optimizer["state"].values())


@pytest.mark.slow
def test_earlier_checkpoints_are_not_overwritten(finished_run):
    folder, _ = finished_run
    before = (folder / "model_final.pth").read_bytes()
    result = train_net("OUTPUT_DIR", folder)
    assert result.returncode == 1
    assert "holds the checkpoints of an earlier run: continue it with --resume" in result.stderr
    assert (folder / "model_final.pth").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.SAMDETR.NUM_CLASSES", 80], "set MODEL.SAMDETR.NUM_CLASSES 10"),
        (["MODEL.SAMDETR.NUM_QUERIE", 80], "Did you mean 'MODEL.SAMDETR.NUM_QUERIES'?"),
        (["--eval-only", "MODEL.WEIGHTS", "missing.pth"], "MODEL.WEIGHTS missing.pth: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
    result = train_net(*arguments, "OUTPUT_DIR", tmp_path)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


@pytest.mark.slow
def test_checkpoint_of_another_architecture_is_refused(finished_run, tmp_path):
    folder, _ = finished_run
    result = train_net(
        *("--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("MODEL.SAMDETR.NUM_QUERIES", 7),
    )
    assert result.returncode == 1
    assert "is of another architecture than the config" in result.stderr.splitlines()[-1]
