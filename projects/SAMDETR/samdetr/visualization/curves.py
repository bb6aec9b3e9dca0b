"""Draw training curves from detectron2's ``metrics.json``, and the authors' published ones."""

import csv
import json
import logging
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..errors import UserError, one_line
from .text import as_drawn

__all__ = ["draw_curves", "published_curves", "published_names", "read_metrics"]

logger = logging.getLogger(__name__)

# Title, metric, and whether it is drawn on a logarithmic scale.
_PANELS = (
    ("training loss, all layers", "total_loss", False),
    ("last layer: class loss", "loss_class", False),
    ("last layer: L1 loss", "loss_l1", False),
    ("last layer: GIoU loss", "loss_giou", False),
    ("box AP", "bbox/AP", False),
    ("learning rate", "lr", True),
    ("seconds per step", "time", False),
    ("GPU memory (MiB)", "max_mem", False),
)

Metrics = dict[str, list[tuple[float, float, float]]]


def read_metrics(run: str | Path) -> Metrics:
    """Read a run's metrics.

    Args:
        run: the run's OUTPUT_DIR, or its ``metrics.json``.

    Returns:
        For every metric, (iteration, epoch, value) in the order of the iterations; epoch is NaN where the run does not
        record it. If a resumed run has written an iteration twice, the later one counts. A line that a killed run left
        unfinished is skipped, with a warning.

    Raises:
        UserError: there is no such file, or it holds no metrics.
    """
    path = Path(run)
    path = path / "metrics.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; name a run's OUTPUT_DIR, or its metrics.json.")
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a run's metrics.json ({error}).") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            iteration, epoch = entry["iteration"], _as_float(entry.get("epoch"))
            if type(iteration) is not int or not 0 <= iteration < 2**53:
                raise ValueError(f"its iteration is {iteration!r}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning(
                "%s, line %d is not a line of metrics and is skipped (%s).", path, number, one_line(error)[:200]
            )
            continue
        for name, value in entry.items():
            if type(value) in (int, float):
                found.setdefault(name, {})[iteration] = (iteration, epoch, _as_float(value))
    if not found:
        raise UserError(f"{path} holds no metrics: it is no run's metrics.json, or the run has not written any yet.")
    return {name: [by_iteration[i] for i in sorted(by_iteration)] for name, by_iteration in found.items()}


def _as_float(value: object) -> float:
    """Return a number that can be drawn; NaN for everything else."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e30 else float("nan")


def _published_rows() -> list[dict]:
    text = resources.files(__package__).joinpath("published_training_curves.csv").read_text()
    return list(csv.DictReader(text.splitlines()))


def published_names() -> list[str]:
    """Return the names of the published models whose curves are known."""
    return list(dict.fromkeys(row["model"] for row in _published_rows()))


def published_curves(name: str) -> Metrics:
    """Return the authors' COCO curves of one model, in the form of :func:`read_metrics`, by epoch; iteration is NaN.

    Raises:
        UserError: the name is not known.
    """
    rows = [row for row in _published_rows() if row["model"] == name]
    if not rows:
        raise UserError(
            f"{name}: there is no such published model; choose from {', '.join(published_names())}.",
            argument="published",
        )
    nan = float("nan")
    return {
        metric: [(nan, float(row["epoch"]), float(row[column])) for row in rows]
        for metric, column in (("total_loss", "train_loss"), ("bbox/AP", "AP"))
    }


def draw_curves(runs: dict[str, Metrics], published: Sequence[str] = ()) -> Figure:
    """Draw losses, AP, learning rate, time and memory of runs, one panel per metric.

    Args:
        runs: by their names in the legend.
        published: names of published models to draw beside them; the horizontal axis then shows epochs.

    Raises:
        UserError: an axis of epochs is needed, but a run does not record its epochs.
    """
    by_epoch = bool(published)
    for name, metrics in runs.items():
        if by_epoch and "epoch" not in metrics:
            raise UserError(
                f"{name} does not record its epochs, which published curves need: its metrics were not written by this "
                "project.",
                argument="published",
            )
    theirs = {f"{name} (published, COCO)": published_curves(name) for name in published}
    panels = _panels({metric for metrics in (*runs.values(), *theirs.values()) for metric in metrics})
    if not panels:
        known = ", ".join(metric for _, metric, _ in _PANELS)
        raise UserError(f"{', '.join(runs)} has none of the metrics that are drawn: {known}.")
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    lines = {}
    for (title, metric, logarithmic), axis in zip(panels, axes):
        for number, (label, metrics) in enumerate(theirs.items()):
            points = metrics.get(metric, [])
            style = {"linestyle": ("--", ":", "-.")[number % 3], "color": ("0.45", "0.65")[number // 3 % 2]}
            if points:
                lines[label] = axis.plot([p[1] for p in points], [p[2] for p in points], label=label, **style)
        for color, (name, metrics) in enumerate(runs.items()):
            points = [p for p in metrics.get(metric, []) if p[2] == p[2]]
            marker = "o-" if metric.endswith("bbox/AP") else "-"
            x = epochs_of(points, metrics) if by_epoch else [p[0] for p in points]
            lines[name] = axis.plot(x, [p[2] for p in points], marker, color=f"C{color}", markersize=4, label=name)
        axis.set(title=title, xlabel="epoch" if by_epoch else "iteration")
        axis.grid(alpha=0.3)
        if logarithmic:
            axis.set_yscale("log")
    for axis in axes:  # those that are left
        axis.axis("off")
    names = [as_drawn(name) for name in lines]
    figure.legend([line[0] for line in lines.values()], names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _panels(metrics: set[str]) -> list[tuple[str, str, bool]]:
    """Return the panels for those of the metrics that are drawn; of several test datasets, each has a panel of its AP."""
    found = []
    for title, metric, logarithmic in _PANELS:
        if metric in metrics:
            found.append((title, metric, logarithmic))
        if metric == "bbox/AP":
            several = sorted(key for key in metrics if key.endswith("/bbox/AP"))
            found += [(f"{title} on {key.removesuffix('/bbox/AP')}", key, logarithmic) for key in several]
    return found


def epochs_of(points: Sequence[tuple[float, float, float]], metrics: Metrics) -> list[float]:
    """Return the epochs of points. Evaluations do not record theirs, which are interpolated."""
    known = metrics["epoch"]
    iterations = [iteration for iteration, *_ in known]
    return np.interp([p[0] for p in points], iterations, [value for *_, value in known]).tolist()
