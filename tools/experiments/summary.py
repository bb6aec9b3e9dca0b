"""Compare the curves of an experiment: a table, a plot, and the raw curves as JSON."""

import json
from pathlib import Path
from statistics import fmean, stdev

from experiment import Experiment
from matplotlib import colormaps
from matplotlib.figure import Figure
from tabulate import tabulate

from samdetr.errors import UserError


def curves_of(results: list[dict], name: str) -> list[list[list[float]]]:
    return [result["curve"] for result in results if result["name"] == name]


def seconds_per_step(curves: list[list[list[float]]]) -> float:
    """Return what all seeds have in common; 0 if it was not measured."""
    return curves[0][-1][1] / curves[0][-1][0]


def first_reaching(curve: list[list[float]], ap: float) -> list[float] | None:
    """Return the first evaluation with that AP or more; None if there is none."""
    return next((point for point in curve if point[2] >= ap), None)


def goals_of(experiment: Experiment, results: list[dict]) -> dict[str, float]:
    """Return the mean final AP of each goal that has been run."""
    curves = {name: curves_of(results, name) for name in experiment.goals}
    return {name: fmean(curve[-1][2] for curve in found) for name, found in curves.items() if found}


def make_table(experiment: Experiment, results: list[dict]) -> str:
    """Make a Markdown table, one row per run: final AP, and how soon each goal's final AP is reached (means over seeds)."""
    goals = goals_of(experiment, results)
    headers = [
        "run",
        "seeds",
        "steps",
        "final AP",
        *(f"reaches {name}'s {ap:.1f}" for name, ap in goals.items()),
        "s per step",
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
            seconds = seconds_per_step(curves)
            row = [entry.name, len(curves), curves[0][-1][0], f"{fmean(final):.1f}{spread}"]
            for ap in goals.values():
                reached = [point[0] for curve in curves if (point := first_reaching(curve, ap))]
                where = f"step {fmean(reached):.0f}" if reached else "no"
                where += f", {fmean(reached) * seconds:.0f} s" if reached and seconds else ""
                few = f" ({len(reached)} of {len(curves)} seeds)" if 0 < len(reached) < len(curves) else ""
                row.append(where + few)
            rows.append([*row, f"{seconds:.3f}" if seconds else ""])
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


def make_plot(experiment: Experiment, results: list[dict]) -> Figure:
    """Plot AP over steps and over time, one row of panels per group; lines are means, bands go from lowest to highest."""
    groups = [group for group in experiment.groups if any(curves_of(results, entry.name) for entry in group.runs)]
    figure = Figure(figsize=(15, 3.8 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 2, squeeze=False)
    goals = goals_of(experiment, results)
    for group, axes in zip(groups, panels):
        names = [name for name in (*group.also, *(entry.name for entry in group.runs)) if curves_of(results, name)]
        timed = [name for name in names if seconds_per_step(curves_of(results, name))]
        for axis, column, label in zip(axes, (0, 1), ("training steps", "seconds of training")):
            if column and not timed:
                axis.set_axis_off()
                continue
            for number, name in enumerate(names):
                if column and name not in timed:
                    continue
                color = colormaps["tab20"](number % 20) if len(names) > 10 else f"C{number}"
                draw_mean(axis, curves_of(results, name), column, name, color, list(goals.values()))
            highest = max(point[2] for name in names for curve in curves_of(results, name) for point in curve)
            for number, (name, ap) in enumerate(goals.items()):
                if ap <= 1.5 * highest:  # otherwise it would flatten the curves
                    style = {"color": "0.3", "linestyle": ("--", ":")[number % 2], "linewidth": 1}
                    axis.axhline(ap, label=f"final AP of {name}: {ap:.1f}", **style)
            axis.set(title=group.title, xlabel=label, ylabel="box AP", xlim=(0, None))
            axis.grid(alpha=0.3)
        everything = axes[0].get_legend_handles_labels()  # runs that were not timed are in the first panel alone
        beside = (1.01 if timed else 0, 1)
        axes[1].legend(*everything, fontsize=8, loc="upper left", bbox_to_anchor=beside, borderaxespad=0)
    return figure


def draw_mean(axis, curves: list, column: int, name: str, color, goals: list[float]) -> None:
    """Draw a run's mean and spread over its seeds, in a colour; rings are where the mean first reaches each goal."""
    seconds = seconds_per_step(curves)
    steps = sorted(set.intersection(*({point[0] for point in curve} for curve in curves)))
    by_step = [[next(point for point in curve if point[0] == step) for curve in curves] for step in steps]
    points = [[step, step * seconds, fmean(p[2] for p in same)] for step, same in zip(steps, by_step)]
    reached = [first_reaching(points, goal) for goal in goals]
    label = f"{name} ({len(curves)} seed{'s' * (len(curves) > 1)})"
    x = [point[column] for point in points]
    axis.plot(x, [point[2] for point in points], color=color, label=label)
    if len(curves) > 1:
        low, high = ([choose(p[2] for p in same) for same in by_step] for choose in (min, max))
        axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    for point in filter(None, reached):
        axis.plot(point[column], point[2], "o", color=color, markerfacecolor="none", markersize=9)


def report(experiment: Experiment, results: list[dict], output: Path) -> None:
    """Write experiments.json and experiments.png."""
    lines = ",\n".join(json.dumps(result) for result in results)  # one run per line
    unfinished = output / "experiments.json.part"
    unfinished.write_text(f"[\n{lines}\n]\n")
    unfinished.replace(output / "experiments.json")
    if results:
        make_plot(experiment, results).savefig(output / "experiments.png", dpi=90)


def read_results(path: Path, names: set[str]) -> list[dict]:
    """Read the curves of the runs with these names from a file that :func:`report` has written."""
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
