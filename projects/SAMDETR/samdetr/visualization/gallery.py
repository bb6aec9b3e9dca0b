"""Images with objects and detections, as HTML that can be filtered by class, kind of error and score."""

import base64
import html
import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from PIL import Image

from ..analysis import ERROR_KINDS, DetectionResults, ErrorSplit
from ..data.images import open_picture

__all__ = ["gallery"]

_LONGEST_SIDE = 512  # of a picture on the page, in pixels


def gallery(
    results: DetectionResults,
    split: ErrorSplit,
    records: Sequence[dict],
    quality: Mapping[int | str, float],
    score_threshold: float,
    num_examples: int,
) -> str:
    """Return the worst and the best images, and further ones with each kind of error.

    Args:
        results: objects, and the detections to show.
        split: of the same results.
        records, quality, score_threshold, num_examples: see :func:`samdetr.visualization.analysis_sections`.
    """
    groups = _choose(results, split, [quality[image_id] for image_id in results.image_ids], num_examples)
    by_id = {record["image_id"]: record for record in records}
    parts = []
    for heading, images in groups.items():
        figures = [
            _figure(image, results, split, by_id[results.image_ids[image]], quality[results.image_ids[image]])
            for image in images
        ]
        if figures:
            parts.append(f'<div class="group"><h3>{heading}</h3><div class="gallery">{"".join(figures)}</div></div>')
    note = (
        f"Detections with a score of {score_threshold:g} or more, in the colour of their kind, with class and score; thin "
        "dashed boxes are ground truth. The worst and the best images are those with the lowest and the highest F1 at IoU 0.5."
    )
    present = Counter(np.concatenate([split.detection_kinds, split.object_kinds]).tolist())
    kinds = [kind for kind in ("correct", *ERROR_KINDS, "ignored") if present[kind]]
    legend = "".join(f'<span><i class="swatch {kind}"></i>{kind}</span>' for kind in kinds)
    return (
        f'<p class="quiet">{note}</p>{_filters(results.class_names, kinds, score_threshold)}'
        f'<div class="legend">{legend}</div>{"".join(parts)}'
    )


def _filters(class_names: Sequence[str], kinds: Sequence[str], score_threshold: float) -> str:
    def select(name: str, options: Iterable[tuple[object, str]]) -> str:
        listed = "".join(f'<option value="{value}">{html.escape(text)}</option>' for value, text in options)
        return f'<label>{name} <select><option value="">any</option>{listed}</select></label>'

    return (
        f'<div class="filters scripted" hidden>{select("class", enumerate(class_names))}{select("kind", zip(kinds, kinds))}'
        f'<label>score from <input type="range" min="{score_threshold:g}" max="1" step="any" value="{score_threshold:g}"> '
        '<output></output></label><label><input type="checkbox" checked> ground truth</label><span role="status"></span></div>'
    )


def _choose(
    results: DetectionResults, split: ErrorSplit, quality: Sequence[float], number: int
) -> dict[str, list[int]]:
    """Choose images: indices by heading, none twice."""
    ranked = sorted(range(len(quality)), key=quality.__getitem__)
    each = min(number, -(-len(ranked) // 2))
    worst = ranked[:each]
    best = [image for image in ranked[::-1][:each] if image not in worst]
    taken = {*worst, *best}
    further: list[int] = []
    for kind in ERROR_KINDS:
        if kind == "missed":
            which = split.object_kinds == kind
            images, labels = results.object_image[which], results.object_class[which]
        else:
            which = split.detection_kinds == kind
            images, labels = results.detection_image[which], results.detection_class[which]
        turns = defaultdict(itertools.count)  # the first of each class, then the second of each, ...
        order = np.argsort([next(turns[label]) for label in labels.tolist()], kind="stable")
        new = [image for image in dict.fromkeys(images[order].tolist()) if image not in taken][:number]
        taken.update(new)
        further += new
    return {"Worst images": worst, "Best images": best, "More of each kind of error": further}


def _figure(image: int, results: DetectionResults, split: ErrorSplit, record: dict, quality: float) -> str:
    names, parts = results.class_names, []

    def add(style: str, box: np.ndarray, what: str, label: str = "", data: str = "") -> None:
        x, y, width, height = 100 * box / np.tile([record["width"], record["height"]], 2)
        side = (" top" if y < 8 else "") + (" right" if x > 75 else "")  # so that the label is inside the image
        parts.append(
            f'<i class="{style}{side}" style="left:{x:.2f}%;top:{y:.2f}%;width:{width:.2f}%;height:{height:.2f}%" {data} '
            f'title="{html.escape(what)}">{label and f"<b>{html.escape(label)}</b>"}</i>'
        )

    for index in np.flatnonzero(results.object_image == image):
        label, kind, box = results.object_class[index], split.object_kinds[index], results.object_boxes[index]
        add("truth crowd" if kind == "crowd" else "truth", box, f"ground truth: {names[label]}")
        if kind == "missed":
            data = f'data-kind="missed" data-classes="{label}"'
            add("box missed", box, f"missed: {names[label]}", names[label], data)
    for index in np.flatnonzero(results.detection_image == image)[::-1]:  # the most confident on top
        label, kind, score = results.detection_class[index], split.detection_kinds[index], results.scores[index]
        classes, what = str(label), f"{names[label]}, score {score:.3f}: {kind}"
        if kind in ("classification", "both"):
            other = results.object_class[split.about[index]]
            classes, what = f"{label} {other}", f"{what}, the object is {names[other]}"
        data = f'data-kind="{kind}" data-classes="{classes}" data-score="{score:.6f}"'
        add(f"box {kind}", results.detection_boxes[index], what, f"{names[label]} {score:.2f}", data)
    return (
        f'<figure class="image"><div class="picture">{_picture(record)}{"".join(parts)}</div>'
        f"<figcaption><b>F1 {100 * quality:.0f}</b>{html.escape(str(record['file_name']).rsplit('/', 1)[-1])}"
        "</figcaption></figure>"
    )


def _picture(record: dict) -> str:
    """Return the image of a record as an HTML element that carries its own data, reduced in size if it is large."""
    size = (record["width"], record["height"])
    # Of any size, since it was evaluated.
    pixels = open_picture(record["file_name"], annotated_size=size, max_pixels=math.inf).pixels
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    image.save(buffer, format="JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
