#!/usr/bin/env python
"""Train a list of configs with several seeds each, and compare how fast they learn: one table, one plot, raw curves.

    tools/experiments/run_experiments.py --experiment tools/experiments/digits.yaml --output output/experiments --jobs 2
    tools/experiments/run_experiments.py --experiment tools/experiments/digits.yaml --output output/experiments --only fcos
    tools/experiments/run_experiments.py --experiment tools/experiments/digits.yaml --output output/experiments --time-steps
    tools/experiments/run_experiments.py --experiment tools/experiments/digits.yaml --output docs --report-only

Each run is a ``train_net.py`` of its own in OUTPUT/runs/NAME/seedN. Whatever stops this tool, the same command continues from
the last checkpoints. Complete runs are not touched (an evaluation that was interrupted is missing from its curve). After each
run the tool writes OUTPUT/experiments.json (the raw curves) and experiments.png (the plot), and at the end it prints a table;
--report-only makes plot and table again from the curves.

Seconds are those of a step times the steps, training alone, without evaluation. --time-steps measures a step of each run, one
run after the other on a machine that does nothing else, and trains nothing; the times of long runs would say what else their
machines had to do.
"""

import argparse
import fcntl
import signal
import sys
from pathlib import Path

from experiment import collect, read_experiment
from scheduler import time_steps, train
from summary import make_table, read_results, report

from samdetr.cli.common import output_folder, run
from samdetr.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=Path, required=True, help="YAML file that lists the runs")
    parser.add_argument("--output", required=True, help="folder for the runs and the report")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="train only these runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    parser.add_argument(
        "--time-steps", action="store_true", help="measure the seconds of a step of each run; train nothing"
    )
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
                    f"{output}: another run_experiments.py, or a run that it has started, works there.",
                    argument="output",
                ) from error
            if arguments.time_steps:
                time_steps(experiment, output, arguments.only, arguments.threads)
                succeeded = True
            else:
                succeeded = train(experiment, output, arguments.only, arguments.jobs, arguments.threads, lock.fileno())
        results = collect(experiment, output)
    report(experiment, results, output)
    print(make_table(experiment, results), end="")
    return 0 if arguments.report_only or succeeded else 1


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command continues from here"))
    run(main, experiment="--experiment")
