"""train_net.py as a user runs it: train, evaluate, resume, and mistakes."""

import json
import pickle
import re
import shutil
import signal
import socket
import time

import pytest
import torch

from helpers import tiny_model
from processes import CONFIG, Script, train_net


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def ap_of(printed):
    """The last AP that a run printed."""
    return re.findall(r"copypaste: ([\d.]+|nan),", printed)[-1]


@pytest.mark.slow
def test_training_writes_checkpoints_metrics_and_logs(trained_run):
    folder, printed = trained_run
    names = {path.name for path in folder.iterdir()}
    assert {"model_0000002.pth", "model_final.pth", "model_best.pth", "config.yaml", "log.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    metrics = {line["iteration"]: line for line in metrics_of(folder)}
    assert metrics[5]["total_loss"] > 0
    # After the third step, and after the sixth and last, which detectron2 counts as iteration 6.
    assert "bbox/AP" in metrics[2] and "bbox/AP" in metrics[6]
    assert "eta: " in printed
    best = torch.load(folder / "model_best.pth", weights_only=True)
    assert set(best) == {"model", "iteration", "metric", "config", "class_names", "category_ids"}
    assert metrics[5]["epoch"] == pytest.approx(6 * 4 / 2000)  # six steps of four of the 2000 images


def test_a_device_by_number_is_for_one_process():
    """A run on the CPU, since this is refused before CUDA is looked at."""
    refused = train_net("--num-gpus", 2, "MODEL.DEVICE", "cuda:1", "SOLVER.IMS_PER_BATCH", 4)
    assert refused.returncode == 1
    assert "MODEL.DEVICE is 'cuda:1', but each process needs a device of its own" in refused.stderr.splitlines()[-1]


def test_each_process_needs_an_image_for_every_part_of_its_batch():
    options = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATION_STEPS", 3]
    refused = train_net("--num-gpus", 2, *options)
    assert refused.returncode == 1
    message = "error: SOLVER.ACCUMULATION_STEPS is 3, more than the 2 images that each process has per step"
    assert refused.stderr.splitlines()[-1].startswith(message)


@pytest.mark.slow
def test_eval_only_gives_the_reported_ap(trained_run, tmp_path):
    folder, printed = trained_run
    evaluated = train_net("--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert ap_of(evaluated.stdout + evaluated.stderr) == ap_of(printed)
    written = [folder / "evaluation.json", tmp_path / "evaluation_model_final.json"]
    results = [json.loads(path.read_text())["results"]["bbox"] for path in written]
    assert results[0] == pytest.approx(results[1], abs=0, nan_ok=True)
    assert {f"AP-{digit}" for digit in range(10)} <= set(results[1])
    assert "ETA=" in evaluated.stdout + evaluated.stderr  # evaluation's progress


@pytest.mark.slow
def test_evaluation_leaves_what_the_run_has_written(trained_run, tmp_path):
    folder = shutil.copytree(trained_run[0], tmp_path / "run")
    before = {name: (folder / name).read_text() for name in ("config.yaml", "evaluation.json")}
    options = ["--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", folder]
    result = train_net(*options, "SOLVER.AMP.ENABLED", True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all((folder / name).read_text() == text for name, text in before.items())
    assert "bfloat16" in (folder / "config_eval.yaml").read_text()
    half = json.loads((folder / "evaluation_model_final.json").read_text())
    assert half["weights"] == str(folder / "model_final.pth")
    # In mixed precision, so not the same. NaN, of sizes that have no boxes, differs from itself.
    results = [found["results"]["bbox"] for found in (half, json.loads(before["evaluation.json"]))]
    finite = [{name: ap for name, ap in result.items() if ap == ap} for result in results]
    assert finite[0] and finite[0] != finite[1]


@pytest.mark.slow
def test_resume_goes_on_where_training_stopped(tmp_path):
    """A run stopped after three of six steps and resumed makes the remaining steps, and keeps its first metrics."""
    first = train_net("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3)
    assert first.returncode == 0, first.stderr[-3000:]
    before = metrics_of(tmp_path)
    second = train_net("--resume", "OUTPUT_DIR", tmp_path)
    assert second.returncode == 0, second.stderr[-3000:]
    assert "Starting training from iteration 3" in second.stdout + second.stderr
    metrics = metrics_of(tmp_path)
    # The first run's final evaluation is that of its last step now.
    assert metrics[0] == {**before[0], **before[1], "iteration": 2} and metrics[-1]["iteration"] == 6
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 5
    optimizer = state["trainer"]["_trainer"]["optimizer"]
    assert all(entry["step"] == 6 for entry in optimizer["state"].values())


@pytest.mark.slow
def test_a_killed_run_resumed_ends_as_one_that_was_not(tmp_path):
    """kill -9 at some moment after the third checkpoint, whatever the run is doing then."""
    options = ["SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "(30,)", "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 0]
    options += ["DATASETS.TEST", "()", "SOLVER.EMA.ENABLED", True]
    whole = train_net("OUTPUT_DIR", tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    script = Script("train_net.py", *CONFIG, "OUTPUT_DIR", tmp_path / "killed", *options)
    deadline = time.time() + 120
    while not (tmp_path / "killed" / "model_0000005.pth").exists():
        assert time.time() < deadline
        assert script.process.exitcode is None, "the run ended before it could be killed"
        time.sleep(0.01)
    script.process.kill()
    assert script.wait().returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model_final.pth").exists()
    resumed = train_net("--resume", "OUTPUT_DIR", tmp_path / "killed", *options)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert "Resuming from" in (tmp_path / "killed" / "log.txt").read_text()
    states = [torch.load(tmp_path / run / "model_final.pth", weights_only=True) for run in ("whole", "killed")]
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name


@pytest.mark.slow
def test_what_this_package_says_is_in_the_log_file(shapes_root, tmp_path):
    """A dataset named in the config, with a box that has to be dropped, and weights for other classes."""
    data = json.loads((shapes_root / "annotations.json").read_text())
    data["annotations"][0]["bbox"] = [5, 5, 0, 10]
    (tmp_path / "bad.json").write_text(json.dumps(data))
    model = tiny_model("MODEL.SAMDETR.DECODER.NUM_LAYERS", 2)
    torch.save({"model": model.state_dict()}, tmp_path / "ten.pth")
    options = [
        *(
            "DATASETS.COCO_FORMAT",
            f"[['bad', '{tmp_path / 'bad.json'}', '{shapes_root}']]",
            "DATASETS.TRAIN",
            "('bad',)",
        ),
        *("DATASETS.TEST", "()", "MODEL.SAMDETR.NUM_CLASSES", 2, "MODEL.WEIGHTS", tmp_path / "ten.pth"),
        *("SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()"),
    ]
    result = train_net(*options, "OUTPUT_DIR", tmp_path / "run")
    assert result.returncode == 0, result.stderr[-3000:]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "bad.json has boxes of width or height zero or less: 1 (" in log
    assert "was trained with another number of classes: decoder.class_heads.0.bias" in log


@pytest.mark.slow
def test_evaluating_a_pretrained_backbone_is_refused(tmp_path):
    weights = {"stem.conv1.weight": torch.zeros(8, 3, 7, 7).numpy()}
    with open(tmp_path / "R-50.pkl", "wb") as f:
        pickle.dump({"model": weights, "__author__": "torchvision", "matching_heuristics": True}, f)
    result = train_net("--eval-only", "MODEL.WEIGHTS", tmp_path / "R-50.pkl", "OUTPUT_DIR", tmp_path)
    assert result.returncode == 1
    assert "holds a pretrained backbone, not a trained detector" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_evaluating_without_weights_warns_loudly(tmp_path):
    result = train_net("--eval-only", "OUTPUT_DIR", tmp_path)
    assert result.returncode == 0
    assert "evaluating RANDOM weights" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_earlier_checkpoints_are_not_overwritten(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "run")
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
        (["--config-file", "nowhere.yaml"], "error: --config-file: nowhere.yaml: there is no such file"),
        (["MODEL.SAMDETR.NUM_QUERIE", 80], "Did you mean 'MODEL.SAMDETR.NUM_QUERIES'?"),
        (["--dist-url", "junk"], "--dist-url is 'junk': give tcp://HOST:PORT or file:///PATH"),
        (["--num-machines", 2, "--machine-rank", 2], "--machine-rank is 2: with --num-machines 2, ranks are 0 to 1"),
        (["--num-machines", 0], "--num-machines 1 or more"),
        (["--eval-only", "OUTPUT_DIR", "/proc/no"], "OUTPUT_DIR /proc/no cannot be written to"),
        (["--eval-only", "--resume"], "--resume goes on training: to evaluate, leave it out, and name the checkpoint"),
        (["SOLVER.MAX_ITER", 3, "--resume"], "'--resume' belongs before the pairs of KEY and VALUE"),
        (
            ["MODEL.WEIGHTS", "http://127.0.0.1:9/R-50.pkl"],
            "MODEL.WEIGHTS http://127.0.0.1:9/R-50.pkl cannot be downloaded",
        ),
        (["--eval-only", "MODEL.WEIGHTS", "missing.pth"], "MODEL.WEIGHTS missing.pth: there is no such file"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
    own = [] if "OUTPUT_DIR" in arguments else ["OUTPUT_DIR", tmp_path]
    result = train_net(*arguments, *own)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr


def test_an_address_that_is_taken_is_named_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        for address, message in ((taken, "already in use"), ("tcp://127.0.0.1:99999", "port must be 0-65535")):
            options = ["--num-gpus", 2, "--dist-url", address, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path / "run"]
            result = train_net(*options)
            assert result.returncode == 1 and not (tmp_path / "run").exists()  # no process was started
            assert re.match(rf"error: --dist-url {address}: .*{message}", result.stderr.splitlines()[-1])


@pytest.mark.slow
def test_checkpoint_of_another_architecture_is_refused(trained_run, tmp_path):
    folder, _ = trained_run
    result = train_net(
        *("--eval-only", "MODEL.WEIGHTS", folder / "model_final.pth", "OUTPUT_DIR", tmp_path),
        *("MODEL.SAMDETR.NUM_QUERIES", 7),
    )
    assert result.returncode == 1
    assert "is of another architecture than the config" in result.stderr.splitlines()[-1]
