"""One HTML page about what a model detects, which needs nothing beside itself: no network, and to be read no JavaScript."""

import html
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources

import numpy as np

from ..analysis import (
    AP_NAMES,
    ERROR_KINDS,
    DetectionResults,
    ErrorSplit,
    ThresholdCurves,
    confusion_matrix,
    error_costs,
    split_errors,
    threshold_curves,
)
from .gallery import gallery

__all__ = ["analysis_sections", "report_page"]


def report_page(title: str, top: str, sections: Mapping[str, str]) -> str:
    """Return the HTML of a page.

    Args:
        title: plain text.
        top: HTML below the title.
        sections: HTML by heading, which is plain text.
    """
    style, script = (
        resources.files(__package__).joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    names = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = "".join(f'<a href="#{name}">{html.escape(heading)}</a>' for heading, name in names.items())
    body = "".join(
        f'<section id="{names[heading]}"><h2>{html.escape(heading)}</h2>{content}</section>'
        for heading, content in sections.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>'
        f"<body><header><h1>{html.escape(title)}</h1>{top}</header><nav><div>{links}</div></nav>{body}"
        f"<script>{script}</script></body></html>"
    )


def analysis_sections(
    results: DetectionResults,
    class_ap: np.ndarray,
    mean_ap: Mapping[str, float],
    records: Sequence[dict],
    quality: Mapping[int | str, float],
    score_threshold: float,
    num_examples: int,
) -> dict[str, str]:
    """Return sections for :func:`report_page`: classes, score thresholds, confusion, errors and images.

    Args:
        results: objects and detections.
        class_ap: (K, 6) in percent, see :func:`samdetr.analysis.class_ap`.
        mean_ap: of all classes, in percent, by the names in :data:`samdetr.analysis.AP_NAMES`.
        records: of the images, in detectron2's standard format.
        quality: F1 of each image id, in [0, 1].
        score_threshold: of the detections that the confusion matrix, the numbers of errors and the images show.
        num_examples: how many of the worst images to show, of the best, and of those with each kind of error.
    """
    shown = results.above(score_threshold)
    split = split_errors(shown)
    return {
        "By class": _class_table(results, class_ap, mean_ap),
        "Score thresholds": _thresholds(results.class_names, threshold_curves(results)),
        "Confusion": _confusion(results.class_names, confusion_matrix(results, score_threshold), score_threshold),
        "Errors": _errors(results, shown, split, score_threshold),
        "Images": gallery(shown, split, records, quality, score_threshold, num_examples),
    }


def _percent(value: float) -> str:
    return "&ndash;" if math.isnan(value) else f"{value:.1f}"


def _cell(value: float, text: str | None = None, before: str = "") -> str:
    """Return a table's cell that is sorted by its value; one without a value is shown as a dash, and sorted to the end."""
    sorted_by = "" if math.isnan(value) else f"{value:.6g}"
    return f'<td data-value="{sorted_by}">{before}<span>{_percent(value) if text is None else text}</span></td>'


def _bar(share: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(max(np.nan_to_num(share), 0), 1):.1f}%"></i></span>'


def _table(
    columns: Sequence[str],
    rows: Sequence[str],
    foot: str = "",
    style: str = "",
    text: Collection[str] = ("class",),
    unsorted: Collection[str] = (),
) -> str:
    """Return a sortable table.

    Args:
        columns: HTML of the headers.
        rows: HTML of the cells of each row.
        foot: of the last row, which stays where it is.
        style: further CSS classes.
        text, unsorted: the columns that hold text, and those that cannot be sorted.
    """
    kinds = {column: ("text " * (column in text) + "unsorted" * (column in unsorted)).strip() for column in columns}
    head = "".join(f'<th scope="col" class="{kinds[column]}">{column}</th>' for column in columns)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    foot = f"<tfoot><tr>{foot}</tr></tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table class="sortable {style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}'
        "</table></div>"
    )


def _name(text: str) -> str:
    return f'<th scope="row" title="{html.escape(text)}">{html.escape(text)}</th>'


def _class_table(results: DetectionResults, class_ap: np.ndarray, mean_ap: Mapping[str, float]) -> str:
    order = sorted(
        range(len(class_ap)), key=lambda label: (-np.nan_to_num(class_ap[label, 0], nan=-1), results.class_names[label])
    )
    counts = results.object_counts()

    def cells(number: int, values: Sequence[float]) -> str:
        first = _cell(values[0], before=_bar(values[0] / 100))
        return _cell(number, str(number)) + first + "".join(_cell(value) for value in values[1:])

    rows = [_name(results.class_names[label]) + cells(counts[label], class_ap[label]) for label in order]
    foot = _name("mean; all objects") + cells(counts.sum(), [mean_ap[name] for name in AP_NAMES])
    note = (
        "COCO's average precision in percent: over IoU thresholds from 0.5 to 0.95, at 0.5, at 0.75, and of small (below "
        "32 &times; 32 pixels), medium and large objects (above 96 &times; 96). A dash: there are no such objects."
    )
    if not counts.any():
        note = "These images have no annotated objects: there is no AP, and every detection is a false one."
    elif not len(results.scores):
        note = "The model detects nothing in these images: there is no AP, and every object is missed."
    return f'<p class="quiet">{note}</p>{_table(["class", "objects", *AP_NAMES], rows, foot)}'


def _curves(curves: ThresholdCurves, row: int) -> str:
    """Draw precision, recall and F1 of one class against the score threshold, and a line at the best F1."""
    lines, detected = [], ~np.isnan(curves.precision[row])
    for name in ("precision", "recall", "f1"):
        values = getattr(curves, name)[row]
        points = [
            f"{200 * t:.0f},{100 - 100 * v:.0f}"
            for t, v in zip(curves.thresholds, np.where(detected, values, np.nan))
            if not math.isnan(v)
        ]
        lines.append(f'<polyline class="{name}" points="{" ".join(points)}"/>')
    if curves.best[row] >= 0:
        best = 200 * curves.thresholds[curves.best[row]]
        lines.insert(0, f'<line class="best" x1="{best:.0f}" x2="{best:.0f}" y1="0" y2="100"/>')
    return f'<svg class="curves" viewBox="0 0 200 100" preserveAspectRatio="none">{"".join(lines)}</svg>'


def _thresholds(class_names: Sequence[str], curves: ThresholdCurves) -> str:
    def row(label: int, name: str) -> str:
        best = curves.best[label]
        nothing = best < 0
        cells = [
            _cell(math.nan if nothing else 100 * getattr(curves, key)[label, best])
            for key in ("f1", "precision", "recall")
        ]
        threshold = math.nan if nothing else curves.thresholds[best]
        cells.insert(1, _cell(threshold, None if nothing else f"{threshold:.3f}"))
        return f'{_name(name)}<td><span class="small">{_curves(curves, label)}</span></td>{"".join(cells)}'

    keys = "".join(
        f'<span class="key"><svg class="curves" viewBox="0 0 20 6"><polyline class="{style}" points="0,3 20,3"/></svg>{name}'
        "</span>"
        for name, style in (("precision", "precision"), ("recall", "recall"), ("F1", "f1"), ("best F1", "best"))
    )
    chart = (
        f'<div class="chart"><div class="title"><b>all classes</b>{keys}</div>'
        "<div class=y><span>1</span><span>0.5</span><span>0</span></div>"
        f"<div class=plot>{_curves(curves, -1)}</div>"
        "<div class=x><span>0</span><span>score threshold</span><span>1</span></div></div>"
    )
    note = (
        "What is left at IoU 0.5 when detections below a score are dropped: precision is the share of detections that are "
        "right, recall the share of objects that are found. The lowest threshold with the best F1 is given. A dash: nothing of "
        "this class is found at any threshold."
    )
    columns = ["class", "curves", "best F1", "at threshold", "precision there", "recall there"]
    rows = [row(label, name) for label, name in enumerate(class_names)]
    table = _table(columns, rows, row(-1, "all classes"), style="choosable", unsorted=("curves",))
    hint = '<p class="quiet scripted" hidden>Choose a class to see its curves above.</p>'
    return f'<p class="quiet">{note}</p>{chart}{hint}{table}'


def _confusion(class_names: Sequence[str], counts: np.ndarray, score_threshold: float) -> str:
    columns, rows = [*class_names, "missed"], [*class_names, "background"]
    last = len(class_names)
    head = "".join(f'<th scope="col" title="{html.escape(name)}">{html.escape(name)}</th>' for name in columns)
    body = []
    for row, name in enumerate(rows):
        total = max(counts[row].sum(), 1)
        cells = []
        for column, other in enumerate(columns):
            number = counts[row, column]
            style = "edge" if column == last else ""
            if number == 0:
                cells.append(f'<td class="{style} zero">{"" if row == column == last else "&middot;"}</td>')
                continue
            what = f"{name}: {number} of {total} {'objects' if row < last else 'false detections'} "
            what += "missed" if column == last else f"detected as {other}"
            share = number / total
            # An error's colour is lighter, so that black can be read on it.
            color = f"0,114,178,{share:.2f}" if row == column else f"213,94,0,{0.75 * share:.2f}"
            strong = "strong" if row == column and share > 0.55 else ""
            cells.append(
                f'<td class="{style} {strong}" style="background:rgba({color})" title="{html.escape(what)}">{number}</td>'
            )
        body.append(f"<tr>{_name(name)}{''.join(cells)}</tr>")
    note = (
        "Rows are ground truth, columns what was detected there: detections with a score of "
        f"{score_threshold:g} or more and an IoU of 0.5 or more. The deeper a cell's colour, the larger its share of the row."
    )
    if not counts[:, :-1].any():
        note += f" No detection has a score of {score_threshold:g} or more."
    corner = "<th>detected as &rarr;<br>ground truth &darr;</th>"
    style = "confusion many" if last > 12 else "confusion"
    return (
        f'<p class="quiet">{note}</p><div class="scroll"><table class="{style}"><thead><tr>{corner}{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _errors(results: DetectionResults, shown: DetectionResults, split: ErrorSplit, score_threshold: float) -> str:
    ap, costs = error_costs(results, split_errors(results))
    counts, most = split.counts(), max(np.nan_to_num([*costs.values()]))
    rows = [
        f'<th scope="row"><i class="swatch {kind}"></i>{kind}</th><td class="text quiet">{meaning}</td>'
        f"{_cell(counts[kind], str(counts[kind]))}{_cell(costs[kind], before=_bar(costs[kind] / max(most, 1e-9)))}"
        for kind, meaning in ERROR_KINDS.items()
    ]
    states = {kind: int((split.object_kinds == kind).sum()) for kind in ("found", "missed", "mistaken")}
    note = (
        "Every false detection and every missed object has exactly one kind of error, as in TIDE (Bolya et al. 2020). The "
        f"numbers count detections with a score of {score_threshold:g} or more. dAP is about all detections: how much higher "
        f"AP50 ({_percent(ap)}) would be if this kind of error alone were corrected. Of {sum(states.values())} objects: "
        f"{states['found']} found, {states['missed']} missed, and {states['mistaken']} that would be found if a localisation "
        "or classification error were corrected."
    )
    if math.isnan(ap):
        note += " There is no AP, since there are no objects."
    elif math.isnan(costs["missed"]):
        note += " Every object is missed, so that no AP would be left without those."
    columns = ["kind", "meaning", "number", "dAP"]
    kinds = _table(columns, rows, text=("kind", "meaning"))
    return f'<p class="quiet">{note}</p>{kinds}<h3>Number by class</h3>{_errors_by_class(shown, split)}'


def _errors_by_class(shown: DetectionResults, split: ErrorSplit) -> str:
    classes = len(shown.class_names)
    columns = {
        kind: np.bincount(shown.detection_class[split.detection_kinds == kind], minlength=classes)
        for kind in ("correct", *ERROR_KINDS)
    }
    columns["missed"] = np.bincount(shown.object_class[split.object_kinds == "missed"], minlength=classes)

    def cells(numbers: Sequence[int]) -> str:
        return "".join(_cell(number, str(number)) for number in numbers)

    rows = [
        _name(name) + cells([column[label] for column in columns.values()])
        for label, name in enumerate(shown.class_names)
    ]
    foot = _name("all classes") + cells([column.sum() for column in columns.values()])
    return _table(["class", *columns], rows, foot)
