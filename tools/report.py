#!/usr/bin/env python
"""Write one self-contained HTML page about a run: curves, AP by class and size, precision and recall, images, config.

    tools/report.py --input output/demo --output output/demo/report.html
    tools/report.py --input output/demo --weights output/demo/model_best.pth --max-images 500 --output report.html

It evaluates the checkpoint (by default the run's model_final.pth) on the run's DATASETS.TEST. The best and worst images are
told by F1 at IoU 0.5, counting detections above --score-threshold.
"""

import argparse
import base64
import html
import io
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import SCORE_THRESHOLD, add_model_arguments, load_predictor, run
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils.collect_env import collect_env_info
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from samdetr.checks import check_config
from samdetr.data import build_test_loader, register_coco_format
from samdetr.errors import UserError
from samdetr.predictor import Predictor, read_image
from samdetr.visualization import draw_annotations, draw_curves, draw_detections, draw_pairs, read_metrics

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; border-bottom: 1px solid #ddd; }
.quiet { color: #666; } .numbers { display: flex; flex-wrap: wrap; gap: 1em; margin: 1em 0; }
.number { background: #f3f5f8; border-radius: 6px; padding: .5em 1.2em; text-align: center; }
.number b { display: block; font-size: 1.5em; }
img { max-width: 100%; } table { border-collapse: collapse; } td, th { padding: .15em .8em; text-align: right; }
td:first-child, th:first-child { text-align: left; } .bar { text-align: left; width: 320px; }
.bar i { display: block; height: .9em; background: #4c78a8; border-radius: 2px; }
pre { background: #f3f5f8; padding: 1em; overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
"""


@dataclass
class Evaluation:
    """COCO's evaluation of the detections, and what each image got.

    Attributes:
        stats: AP, AP50, AP75, APs, APm, APl in percent; NaN where there are no such boxes.
        class_ap: AP in percent by class index; NaN for a class without boxes.
        precision: (T, R), by IoU threshold and recall, mean over classes.
        quality: F1 of each image id, in [0, 1].
    """

    stats: dict[str, float]
    class_ap: list[float]
    precision: np.ndarray
    quality: dict[int, float]


def detect(predictor: Predictor, name: str, max_images: int | None) -> tuple[list[dict], dict[int, Instances]]:
    """Records of the dataset, and the detections by image id."""
    records = DatasetCatalog.get(name)[:max_images]
    wanted, found = {record["image_id"] for record in records}, {}
    loader = build_test_loader(predictor.cfg, name)
    progress = tqdm(total=len(records), unit="image")
    for batch in loader:
        if len(found) == len(wanted):
            break
        with torch.no_grad():
            outputs = predictor.model(batch)
        for inputs, output in zip(batch, outputs):
            if inputs["image_id"] in wanted:
                found[inputs["image_id"]] = output["instances"].to("cpu")
                progress.update()
    progress.close()
    return records, found


def evaluate(name: str, records: list[dict], found: dict[int, Instances], threshold: float) -> Evaluation:
    """Evaluate as detectron2's COCOEvaluator does, keeping the precisions."""
    metadata = MetadataCatalog.get(name)
    truth = COCO()
    truth.dataset = convert_to_coco_dict(name)
    truth.createIndex()
    to_contiguous = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    to_dataset = {contiguous: dataset for dataset, contiguous in to_contiguous.items()}
    results = [entry for image_id, instances in found.items() for entry in instances_to_coco_json(instances, image_id)]
    for entry in results:
        entry["category_id"] = to_dataset.get(entry["category_id"], entry["category_id"])
    if not results:
        raise UserError("The model detects nothing at all: is it trained?")
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.params.imgIds = sorted(found)
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (T, R, K, areas, numbers of detections); -1: no box
    precision = np.where(precision < 0, np.nan, precision)

    def mean(values: np.ndarray) -> float:
        return float(100 * np.nanmean(values)) if np.isfinite(values).any() else math.nan

    everything = precision[..., 0, -1]
    stats = {"AP": mean(everything), "AP50": mean(everything[0]), "AP75": mean(everything[5])}
    stats |= {f"AP{size}": mean(precision[..., area, -1]) for area, size in ((1, "s"), (2, "m"), (3, "l"))}
    with np.errstate(all="ignore"):
        by_recall = np.nanmean(everything, axis=2) if np.isfinite(everything).any() else everything[..., 0]
    order = {category: i for i, category in enumerate(evaluation.params.catIds)}
    class_ap = [
        mean(everything[:, :, order[to_dataset.get(i, i)]]) if to_dataset.get(i, i) in order else math.nan
        for i in range(len(metadata.thing_classes))
    ]
    quality = {record["image_id"]: f1(record, found[record["image_id"]], threshold) for record in records}
    return Evaluation(stats, class_ap, by_recall, quality)


def f1(record: dict, instances: Instances, threshold: float) -> float:
    """F1 of one image at IoU 0.5: every box is found by at most one detection of its class, the best first."""
    truth = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    confident = instances[instances.scores >= threshold]
    if not truth and not len(confident):
        return 1.0
    corners = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
    overlap = pairwise_iou(confident.pred_boxes, Boxes(torch.tensor(corners).reshape(-1, 4)))
    labels = torch.tensor([a["category_id"] for a in truth], dtype=torch.long)
    overlap = torch.where(confident.pred_classes[:, None] == labels, overlap, 0.0)
    hits = 0
    for row in overlap:
        if len(row) and row.max() >= 0.5:
            hits += 1
            overlap[:, row.argmax()] = 0
    return 2 * hits / (len(truth) + len(confident))


def picture(array: np.ndarray) -> str:
    """An image as an HTML element that carries its own data."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def drawing(figure: Figure) -> str:
    """A figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    encoded = base64.b64encode(text[text.index("<svg") :].encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}">'


def precision_recall(evaluation: Evaluation) -> Figure:
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.subplots()
    recall = np.linspace(0, 1, evaluation.precision.shape[1])
    for threshold, label in ((0, "IoU 0.50"), (5, "IoU 0.75"), (9, "IoU 0.95")):
        axis.plot(recall, evaluation.precision[threshold], label=label)
    axis.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    return figure


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def number_boxes(stats: dict[str, float]) -> str:
    return "".join(f'<div class="number">{name}<b>{percent(value)}</b></div>' for name, value in stats.items())


def class_table(names: list[str], evaluation: Evaluation, records: list[dict]) -> str:
    counts = np.zeros(len(names), int)
    for record in records:
        for annotation in record.get("annotations", []):
            counts[annotation["category_id"]] += 1
    rows = sorted(zip(names, counts, evaluation.class_ap), key=lambda row: -1 if math.isnan(row[2]) else -row[2])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{count}</td><td>{percent(ap)}</td>"
        f'<td class="bar"><i style="width:{0 if math.isnan(ap) else ap:.1f}%"></i></td></tr>'
        for name, count, ap in rows
    )
    return f"<table><tr><th>class</th><th>boxes</th><th>AP</th><th></th></tr>{body}</table>"


def images(records: list[dict], found: dict[int, Instances], names: list[str], threshold: float) -> str:
    pairs = []
    for record in records:
        image = read_image(record["file_name"])
        detections = draw_detections(image, found[record["image_id"]], names, threshold)
        pairs.append((draw_annotations(image, record, names), detections))
    return picture(draw_pairs(pairs, columns=2))


def write_page(arguments: argparse.Namespace, predictor: Predictor, weights: Path) -> str:
    """The page's HTML."""
    name = predictor.cfg.DATASETS.TEST[0]
    records, found = detect(predictor, name, arguments.max_images)
    evaluation = evaluate(name, records, found, arguments.score_threshold)
    names = predictor.class_names
    ranked = sorted(records, key=lambda record: evaluation.quality[record["image_id"]])
    number = min(arguments.num_examples, len(ranked) // 2)
    worst, best = ranked[:number], ranked[::-1][:number]
    metrics = Path(arguments.input) / "metrics.json"
    curves = drawing(draw_curves({"this run": read_metrics(metrics)})) if metrics.exists() else "No metrics.json."
    quality = np.mean(list(evaluation.quality.values()))
    title = html.escape(str(arguments.input))
    sections = [
        f"<h1>{title}</h1><p class=quiet>{html.escape(str(weights))} on {len(records)} images of {html.escape(name)}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}</p><div class=numbers>{number_boxes(evaluation.stats)}"
        f'<div class="number">F1 at {arguments.score_threshold}<b>{100 * quality:.1f}</b></div></div>',
        f"<h2>Training</h2>{curves}",
        f"<h2>Precision and recall</h2>{drawing(precision_recall(evaluation))}",
        f"<h2>By class</h2>{class_table(names, evaluation, records)}",
        f"<h2>Worst images</h2><p class=quiet>Ground truth left, detections right.</p>"
        f"{images(worst, found, names, arguments.score_threshold)}",
        f"<h2>Best images</h2>{images(best, found, names, arguments.score_threshold)}",
        f"<h2>Config</h2><details><summary>All keys</summary><pre>{html.escape(predictor.cfg.dump())}</pre></details>",
        f"<h2>Environment</h2><details><summary>Versions</summary><pre>{html.escape(collect_env_info())}</pre></details>",
    ]
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    return f"{head}<body>{''.join(f'<section>{section}</section>' for section in sections)}</body></html>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, metavar="RUN", help="the run's OUTPUT_DIR")
    add_model_arguments(parser, required=False)
    parser.add_argument("--output", required=True, help="HTML file")
    parser.add_argument("--score-threshold", type=float, default=SCORE_THRESHOLD)
    parser.add_argument("--num-examples", type=int, default=8, help="best and worst images to show of each")
    parser.add_argument("--max-images", type=int, help="evaluate the first N images only")
    arguments = parser.parse_args()
    if not Path(arguments.input).is_dir():
        raise UserError(f"--input {arguments.input}: there is no such folder; name a run's OUTPUT_DIR.")
    weights = Path(arguments.weights or Path(arguments.input) / "model_final.pth")
    if not weights.exists():
        raise UserError(f"{weights}: there is no such file; name a checkpoint with --weights.")
    predictor = load_predictor(arguments, str(weights))
    register_coco_format(predictor.cfg)
    check_config(predictor.cfg, training=False)
    page = write_page(arguments, predictor, weights)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)
    print(f"{output}: {len(page) / 2**20:.1f} MiB")


if __name__ == "__main__":
    run(main)
