#!/usr/bin/env python
"""Train a list of configs with several seeds each, and compare how fast they learn: one table, one plot, raw curves.

    tools/run_experiments.py --experiment tools/experiments/digits.yaml --output output/experiments --jobs 2 --threads 1
    tools/run_experiments.py --experiment tools/experiments/digits.yaml --output output/experiments --only sam_detr fcos
    tools/run_experiments.py --experiment tools/experiments/digits.yaml --output docs --report-only

Each run is a ``train_net.py`` of its own in OUTPUT/runs/NAME/seedN. Whatever stops this tool, the same command goes on from
the last checkpoints; runs that are complete are not touched (an evaluation that was cut off is missing from its curve).
After each run it writes OUTPUT/experiments.json (the raw curves) and experiments.png (the plot), and at the end it prints a
table; --report-only makes plot and table anew from the curves.

Seconds are those of an undisturbed step times the steps: training alone, without evaluation, on this machine. An undisturbed
step is the tenth percentile of the times that a run has logged, since a machine does other things now and then.
"""

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

import yaml
from common import output_folder, run
from detectron2.config import get_cfg
from matplotlib.figure import Figure
from tabulate import tabulate

import samdetr
from samdetr.checks import check_config, merge_options
from samdetr.errors import UserError
from samdetr.visualization import read_metrics

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """One config with several seeds."""

    name: str
    config: str
    seeds: list[int]
    options: list[str] = field(default_factory=list)

    def folder(self, output: Path, seed: int) -> Path:
        return output / "runs" / self.name / f"seed{seed}"


@dataclass
class Group:
    """Runs that share a plot; ``also`` names runs of other groups to show beside them."""

    title: str
    runs: list[Run]
    also: list[str] = field(default_factory=list)


@dataclass
class Experiment:
    """What an experiment's file says."""

    goals: list[str]
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment's file; configs are looked for in the repository."""
    try:
        content = yaml.safe_load(path.read_text())
        groups = []
        for group in content["groups"]:
            runs = [Run(**entry) for entry in group.pop("runs")]
            for entry in runs:
                entry.seeds = [int(seed) for seed in entry.seeds]
                entry.options = [str(option) for option in entry.options]
            groups.append(Group(runs=runs, **group))
        experiment = Experiment(list(content["goals"]), groups)
    except OSError as error:
        raise UserError(f"--experiment {path}: {error.strerror}.") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"--experiment {path} is not an experiment ({type(error).__name__}: {error}): it needs 'goals' and 'groups', "
            "each with 'title', 'runs' (name, config, seeds, perhaps options) and perhaps 'also'."
        ) from error
    names = [entry.name for entry in experiment.runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--experiment {path} has several runs named {name!r}: give each a name of its own.")
    for name in [*experiment.goals, *(name for group in groups for name in group.also)]:
        if name not in names:
            raise UserError(f"--experiment {path} mentions {name!r}, which is none of its runs: {', '.join(names)}.")
    return experiment


def config_of(entry: Run, seed: int, folder: Path):
    """The full config of a run."""
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    merge_options(cfg, str(ROOT / entry.config), [*entry.options, "SEED", str(seed), "OUTPUT_DIR", str(folder)])
    return cfg


def check_run(entry: Run, cfg) -> None:
    """Refuse now what would come to light hours later."""
    check_config(cfg, training=True)
    if not 0 < cfg.TEST.EVAL_PERIOD <= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"{entry.name}: TEST.EVAL_PERIOD is {cfg.TEST.EVAL_PERIOD}, so that there is no curve: it must be between 1 and "
            f"SOLVER.MAX_ITER ({cfg.SOLVER.MAX_ITER})."
        )


def differences(cfg, folder: Path) -> list[str]:
    """Keys whose values in a run's folder are not the config's; where the folder lies does not matter."""
    kept, wanted = (flatten(yaml.safe_load(text)) for text in ((folder / "experiment.yaml").read_text(), cfg.dump()))
    return [key for key in sorted({*kept, *wanted}) if key != "OUTPUT_DIR" and kept.get(key) != wanted.get(key)]


def flatten(node: dict, prefix: str = "") -> dict:
    """Nested keys, joined by dots."""
    result = {}
    for key, value in node.items():
        result.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return result


def keep_config(cfg, folder: Path) -> None:
    """Keep the run's config in its folder; refuse one where another config has been trained: its curve would be of two."""
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


def read_curve(folder: Path, max_iter: int) -> list[list[float]]:
    """``[[step, seconds, AP], ...]`` of a run until now; AP is 0 where nothing was detected."""
    path = folder / "metrics.json"
    if not path.is_file() or not path.stat().st_size:  # a run that has just begun has an empty one
        return []
    try:
        metrics = read_metrics(folder)
    except UserError:  # one unfinished line
        return []
    times = sorted(value for _, _, value in metrics.get("time", [(0, 0, 0.0)]))
    step_time = times[len(times) // 10]
    # detectron2 counts from 0 during training, and names the last evaluation by the number of steps.
    curve = {min(int(i) + 1, max_iter): 0.0 if ap != ap else ap for i, _, ap in metrics.get("bbox/AP", [])}
    return [[step, round(step * step_time, 2), round(ap, 3)] for step, ap in curve.items()]


def train(experiment: Experiment, output: Path, only: list[str], jobs: int, threads: int, lock: int) -> bool:
    """Train what is not complete yet, ``jobs`` runs at a time; whether all succeeded.

    The runs inherit the file descriptor ``lock``, so that the folder stays locked while one of them goes on without this tool.
    """
    waiting, max_iters = [], {}
    for group in experiment.groups:  # the seeds take turns, so that an early end leaves something of every run
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


def collect(experiment: Experiment, output: Path) -> list[dict]:
    """The curves of all runs that are complete and of the experiment's configs."""
    results = []
    for entry in experiment.runs:
        for seed in entry.seeds:
            folder = entry.folder(output, seed)
            cfg = config_of(entry, seed, folder)
            if not (folder / "experiment.yaml").is_file() or differences(cfg, folder):
                continue
            max_iter = cfg.SOLVER.MAX_ITER
            curve = read_curve(folder, max_iter)
            if curve and curve[-1][0] == max_iter:
                results.append({"name": entry.name, "config": entry.config, "seed": seed, "curve": curve})
    return results


def curves_of(results: list[dict], name: str) -> list[list[list[float]]]:
    return [result["curve"] for result in results if result["name"] == name]


def first_reaching(curve: list[list[float]], ap: float) -> list[float] | None:
    """The first evaluation with that AP or more."""
    return next((point for point in curve if point[2] >= ap), None)


def goals_of(experiment: Experiment, results: list[dict]) -> dict[str, float]:
    """The mean final AP of each goal that has been run."""
    curves = {name: curves_of(results, name) for name in experiment.goals}
    return {name: fmean(curve[-1][2] for curve in found) for name, found in curves.items() if found}


def make_table(experiment: Experiment, results: list[dict]) -> str:
    """A Markdown table, a row for each run: final AP, and how soon each goal's final AP is reached (means over the seeds)."""
    goals = goals_of(experiment, results)
    headers = [
        "run",
        "seeds",
        "steps",
        "final AP",
        *(f"reaches {name}'s {ap:.1f}" for name, ap in goals.items()),
        "s a step",
    ]
    rows = []
    for group in experiment.groups:
        rows.append([f"**{group.title}**", *[""] * (len(headers) - 1)])
        for entry in group.runs:
            curves = curves_of(results, entry.name)
            if not curves:
                rows.append([entry.name, "not run", *[""] * (len(headers) - 2)])
                continue
            final = [curve[-1][2] for curve in curves]
            spread = f" ± {stdev(final):.1f}" if len(final) > 1 else ""
            row = [entry.name, len(curves), curves[0][-1][0], f"{fmean(final):.1f}{spread}"]
            for ap in goals.values():
                reached = [point for curve in curves if (point := first_reaching(curve, ap))]
                where = (
                    f"step {fmean(p[0] for p in reached):.0f}, {fmean(p[1] for p in reached):.0f} s"
                    if reached
                    else "no"
                )
                few = f" ({len(reached)} of {len(curves)} seeds)" if 0 < len(reached) < len(curves) else ""
                row.append(where + few)
            rows.append([*row, f"{fmean(curve[-1][1] / curve[-1][0] for curve in curves):.3f}"])
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


def make_plot(experiment: Experiment, results: list[dict]) -> Figure:
    """AP over steps and over time, a row of panels for each group; lines are means, bands reach from lowest to highest."""
    groups = [group for group in experiment.groups if any(curves_of(results, entry.name) for entry in group.runs)]
    figure = Figure(figsize=(15, 3.8 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    goals = goals_of(experiment, results)
    for group, axes in zip(groups, panels):
        names = [name for name in (*group.also, *(entry.name for entry in group.runs)) if curves_of(results, name)]
        for axis, column, label in zip(axes, (0, 1), ("training steps", "seconds of training")):
            for number, name in enumerate(names):
                draw_mean(axis, curves_of(results, name), column, name, f"C{number}", list(goals.values()))
            highest = max(point[2] for name in names for curve in curves_of(results, name) for point in curve)
            for number, (name, ap) in enumerate(goals.items()):
                if ap <= 1.5 * highest:  # else it would press the curves to the ground
                    style = {"color": "0.3", "linestyle": ("--", ":")[number % 2], "linewidth": 1}
                    axis.axhline(ap, label=f"final AP of {name}: {ap:.1f}", **style)
            axis.set(title=group.title, xlabel=label, ylabel="box AP")
            axis.grid(alpha=0.3)
        axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def draw_mean(axis, curves: list, column: int, name: str, color: str, goals: list[float]) -> None:
    """One run's mean and spread over its seeds; rings where the mean first reaches each goal, named in the legend."""
    steps = sorted(set.intersection(*({point[0] for point in curve} for curve in curves)))
    by_step = [[next(point for point in curve if point[0] == step) for curve in curves] for step in steps]
    points = [[step, fmean(p[1] for p in same), fmean(p[2] for p in same)] for step, same in zip(steps, by_step)]
    reached = [first_reaching(points, goal) for goal in goals]
    where = ", ".join(str(point[0]) if point else "never" for point in reached)
    label = f"{name} ({len(curves)} seed{'s' * (len(curves) > 1)}; reached at {where})"
    x = [point[column] for point in points]
    axis.plot(x, [point[2] for point in points], color=color, label=label)
    if len(curves) > 1:
        low, high = ([choose(p[2] for p in same) for same in by_step] for choose in (min, max))
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for point in filter(None, reached):
        axis.plot(point[column], point[2], "o", color=color, markerfacecolor="none", markersize=9)


def report(experiment: Experiment, results: list[dict], output: Path) -> None:
    """Write experiments.json and experiments.png."""
    lines = ",\n".join(json.dumps(result) for result in results)  # a run a line
    unfinished = output / "experiments.json.part"
    unfinished.write_text(f"[\n{lines}\n]\n")
    unfinished.replace(output / "experiments.json")
    if results:
        make_plot(experiment, results).savefig(output / "experiments.png", dpi=90)


def read_results(path: Path, names: set[str]) -> list[dict]:
    """The curves in a file that :func:`report` has written, of the runs with these names."""
    try:
        results = json.loads(path.read_text())
        if not all({"name", "config", "seed", "curve"} <= result.keys() and result["curve"] for result in results):
            raise ValueError("an entry lacks name, config, seed or curve")
        results = [result for result in results if result["name"] in names]
        if not results:
            raise ValueError(f"none is of {', '.join(sorted(names))}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path} has no curves to report ({error}).") from error
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="YAML file that lists the runs")
    parser.add_argument("--output", required=True, help="folder for the runs and the report")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="train only these runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    experiment = read_experiment(arguments.experiment)
    unknown = set(arguments.only) - {entry.name for entry in experiment.runs}
    if unknown:
        raise UserError(f"--only names {', '.join(sorted(unknown))}, none of the runs in {arguments.experiment}.")
    if arguments.jobs < 1 or arguments.threads < 1:
        raise UserError("--jobs and --threads must be at least 1.")
    output = output_folder(arguments.output)
    if arguments.report_only:
        results = read_results(output / "experiments.json", {entry.name for entry in experiment.runs})
    else:
        with (output / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"--output {output}: another run_experiments.py, or a run that it has started, works there."
                ) from error
            succeeded = train(experiment, output, arguments.only, arguments.jobs, arguments.threads, lock.fileno())
        results = collect(experiment, output)
    report(experiment, results, output)
    print(make_table(experiment, results), end="")
    return 0 if arguments.report_only or succeeded else 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command goes on from here"))
    run(main)
