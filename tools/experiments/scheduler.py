"""Train the runs of an experiment, several at a time, each in a process of its own; go on where an earlier one stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from experiment import ROOT, Experiment, Run, collect, config_of, differences, read_curve, read_step_times
from summary import report

from samdetr.checks import check_config
from samdetr.data import register_datasets
from samdetr.errors import UserError
from samdetr.visualization import read_metrics


def check_run(entry: Run, cfg) -> None:
    """Refuse a run whose mistakes would otherwise come to light hours later."""
    register_datasets(cfg)
    cfg = cfg.clone()
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"  # as train_net.py does
    check_config(cfg, training=True)
    if cfg.SOLVER.EPOCHS:
        raise UserError(
            f"{entry.name}: SOLVER.EPOCHS is {cfg.SOLVER.EPOCHS}, but runs are compared by steps: set MAX_ITER."
        )
    if cfg.SOLVER.PATIENCE:
        raise UserError(
            f"{entry.name}: SOLVER.PATIENCE is {cfg.SOLVER.PATIENCE}, but all runs have all of their steps: set 0."
        )
    if not 0 < cfg.TEST.EVAL_PERIOD <= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{entry.name}: TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so that there is no curve: it must be between 1 and "
            f"SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER})."
        )


def keep_config(cfg, folder: Path) -> None:
    """Keep the run's config in its folder; refuse a folder where another config was trained, which would mix two curves."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "experiment.yaml"
    if kept.exists() and (folder / "stdout.txt").exists():
        keys = differences(cfg, folder)
        if keys:
            raise UserError(
                f"{folder} holds a run of another config, which differs in {', '.join(keys[:5])}: name another --output, or "
                "move that folder away."
            )
    kept.write_text(cfg.dump())


def time_steps(experiment: Experiment, output: Path, only: list[str], threads: int) -> None:
    """Measure the seconds per step of each run, one after the other, and write them to OUTPUT/step_times.json.

    The first 60 steps are made again. detectron2 logs the median of each 20; the smallest counts, also of several calls.
    """
    step_times = read_step_times(output)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for entry in experiment.runs:
        if only and entry.name not in only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                str(ROOT / "train_net.py"),
                "--config-file",
                str(ROOT / entry.config),
                *entry.options,
            ]
            command += ["SOLVER.MAX_ITER", "60", "SOLVER.STEPS", "()", "DATASETS.TEST", "()", "SEED", "1", "OUTPUT_DIR"]
            done = subprocess.run([*command, folder], capture_output=True, text=True, env=environment)
            if done.returncode:
                raise UserError(f"{entry.name} failed: {done.stderr.strip().splitlines()[-1:]}")
            step_times[entry.name] = min(
                step_times.get(entry.name, math.inf),
                *(round(value, 4) for _, _, value in read_metrics(folder)["time"][1:]),
            )
        print(f"{entry.name}: {step_times[entry.name]:.3f} s per step", flush=True)
    (output / "step_times.json").write_text(json.dumps(step_times, indent=1) + "\n")


def train(experiment: Experiment, output: Path, only: list[str], jobs: int, threads: int, lock: int) -> bool:
    """Train what is not complete yet, ``jobs`` runs at a time; return whether all succeeded.

    The runs inherit the file descriptor ``lock``, so that the folder stays locked while one of them outlives this tool.
    """
    waiting, max_iters = [], {}
    for group in experiment.groups:  # the seeds take turns, so that stopping early leaves something of every run
        for seed in sorted({seed for entry in group.runs for seed in entry.seeds}):
            for entry in group.runs:
                if seed in entry.seeds and (not only or entry.name in only):
                    folder = entry.folder(output, seed)
                    cfg = config_of(entry, seed, folder)
                    check_run(entry, cfg)
                    keep_config(cfg, folder)
                    waiting.append((entry, seed, folder))
                    max_iters[folder] = cfg.SOLVER.MAX_ITER

    def complete(folder: Path) -> bool:
        curve = read_curve(folder, max_iters[folder])
        return bool(curve) and curve[-1][0] == max_iters[folder]

    todo = [item for item in waiting if not complete(item[2])]
    print(f"{len(waiting) - len(todo)} of {len(waiting)} runs are complete; {jobs} at a time, {threads} threads each.")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    running: dict[subprocess.Popen, tuple] = {}
    failed = []
    started = time.perf_counter()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                entry, seed, folder = todo.pop(0)
                command = [sys.executable, str(ROOT / "train_net.py"), "--resume"]
                command += ["--config-file", str(ROOT / entry.config), *entry.options]
                command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
                with (folder / "stdout.txt").open("a") as log:
                    options = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment, "pass_fds": [lock]}
                    process = subprocess.Popen(command, **options)
                running[process] = (entry, seed, folder)
            time.sleep(0.5)
            for process in [process for process in running if process.poll() is not None]:
                entry, seed, folder = running.pop(process)
                minutes = (time.perf_counter() - started) / 60
                if process.returncode or not complete(folder):
                    failed.append(folder)
                    last = (folder / "stdout.txt").read_text(errors="replace").strip().splitlines()[-1:]
                    print(
                        f"{minutes:5.1f} min  {entry.name}, seed {seed}: FAILED, see {folder}/stdout.txt: {' '.join(last)}"
                    )
                else:
                    ap = read_curve(folder, max_iters[folder])[-1][2]
                    print(
                        f"{minutes:5.1f} min  {entry.name}, seed {seed}: AP {ap:.1f}; {len(todo)} runs wait", flush=True
                    )
                report(experiment, collect(experiment, output), output)
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait()
    return not failed
