"""samdetr.engine.stops: a signal ends a run after its step, which is saved; a process without its partner ends soon."""

import json
import os
import re
import signal
import time

import pytest
import torch

from processes import CONFIG, Script, train_net
from samdetr.engine.stops import StoppableLoader, StopRequested, catch_signals, received_signal


def test_a_signal_is_remembered_and_forgotten():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals():
        assert received_signal() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert received_signal() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)  # the same one, by another way
        seen = []
        with pytest.raises(StopRequested) as stop:
            for batch in StoppableLoader([1, 2]):
                seen.append(batch)
        assert stop.value.code == 143 and not seen
    assert received_signal() is None and signal.getsignal(signal.SIGTERM) is before
    assert list(StoppableLoader([1, 2])) == [1, 2]


OPTIONS = [
    *("SOLVER.STEPS", "(300,)", "SOLVER.CHECKPOINT_PERIOD", 1000, "TEST.EVAL_PERIOD", 0, "SEED", 5),
    *("DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1),
]


def wait_for(path, text, running):
    """Wait until a file holds a text; ``running`` says whether the process that writes it still lives."""
    deadline = time.time() + 120
    while not (path.exists() and text in path.read_text()):
        assert time.time() < deadline and running()
        time.sleep(0.02)


@pytest.mark.slow
def test_a_stopped_run_says_where_to_go_on_and_ends_as_one_that_was_not(tmp_path):
    script = Script("train_net.py", *CONFIG, "OUTPUT_DIR", tmp_path / "run", "SOLVER.MAX_ITER", 4000, *OPTIONS)
    wait_for(tmp_path / "run" / "log.txt", "iter: 19", script.process.is_alive)
    os.kill(script.process.pid, signal.SIGINT)
    result = script.wait()
    assert result.returncode == 130
    finished = int(re.search(r"after iteration (\d+) of 4000\. Resume this run from OUTPUT_DIR", result.stdout)[1])
    assert (tmp_path / "run" / "last_checkpoint").read_text() == f"model_{finished:07d}.pth"
    assert "Traceback" not in result.stderr and "Continue with: --resume" in result.stderr
    options = ["SOLVER.MAX_ITER", finished + 3, *OPTIONS]
    assert train_net("--resume", "OUTPUT_DIR", tmp_path / "run", *options).returncode == 0
    assert train_net("OUTPUT_DIR", tmp_path / "whole", *options).returncode == 0
    states = [torch.load(tmp_path / run / "model_final.pth", weights_only=True)["model"] for run in ("run", "whole")]
    # Both follow the same schedule up to the step at which the first was stopped.
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    iterations = [
        json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()
    ]
    assert len(iterations) == len(set(iterations)) and iterations == sorted(iterations)


@pytest.mark.thorough
def test_the_final_evaluation_can_be_interrupted_too(tmp_path):
    """With workers, which leave the signal to the run, and must not keep it from ending."""
    options = [*OPTIONS, "DATASETS.TEST", "('digits_val_20',)", "SOLVER.MAX_ITER", 2]
    script = Script("train_net.py", *CONFIG, "OUTPUT_DIR", tmp_path, *options)
    wait_for(tmp_path / "log.txt", "Start inference on", script.process.is_alive)
    os.kill(script.process.pid, signal.SIGTERM)
    assert script.wait(timeout=60).returncode == 143
    assert train_net("--resume", "OUTPUT_DIR", tmp_path, *options).returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2] and "bbox/AP" in lines[1]


@pytest.mark.slow
def test_an_evaluation_that_was_interrupted_is_made_up_for(tmp_path):
    options = [*OPTIONS, "DATASETS.TEST", "('digits_val_20',)", "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 4]
    script = Script("train_net.py", *CONFIG, "OUTPUT_DIR", tmp_path, *options)
    wait_for(tmp_path / "log.txt", "Start inference on", script.process.is_alive)
    os.kill(script.process.pid, signal.SIGTERM)
    assert script.wait().returncode == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert train_net("--resume", "OUTPUT_DIR", tmp_path, *options).returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [1, 4]
    assert len({line["iteration"] for line in lines}) == len(lines)


def children(pid):
    """The process ids of a process's children."""
    found = []
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/stat") as file:
                    if file.read().rsplit(")", 1)[1].split()[1] == str(pid):
                        found.append(int(folder))
            except OSError:  # it has ended
                continue
    return found


def start_two(folder, *options):
    """Start two processes in a group of their own, as a terminal does."""
    options = [*OPTIONS, "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 4000, *options]
    return Script("train_net.py", *CONFIG, "--num-gpus", 2, "OUTPUT_DIR", folder, *options, threads=1, group=True)


EVALUATED = ["DATASETS.TEST", "('digits_val_20',)", "TEST.EVAL_PERIOD", 20]


@pytest.mark.slow
@pytest.mark.parametrize("whom, evaluated", [("first", False), ("second", True), ("group", False), ("group", True)])
def test_two_processes_stop_together(whom, evaluated, tmp_path):
    """Whoever gets the signal, in a step or in an evaluation, where one of them may have finished its share already."""
    script = start_two(tmp_path, *(EVALUATED if evaluated else []))
    process = script.process
    wait_for(tmp_path / "log.txt", "Start inference on" if evaluated else "iter: 19", process.is_alive)
    if whom == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill(process.pid if whom == "first" else max(children(process.pid)), signal.SIGTERM)
    result = script.wait(30)
    assert result.returncode == 143
    assert "Traceback" not in result.stderr and "Continue with: --resume" in result.stderr
    assert re.fullmatch(r"model_\d+\.pth", (tmp_path / "last_checkpoint").read_text())


@pytest.mark.slow
def test_a_process_that_loses_its_partner_ends_and_says_so(tmp_path):
    script = start_two(tmp_path)
    wait_for(tmp_path / "log.txt", "iter: 19", script.process.is_alive)
    os.kill(max(children(script.process.pid)), signal.SIGKILL)
    result = script.wait(30)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr and "another process of this run has ended" in result.stderr
