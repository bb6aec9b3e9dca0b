"""Write one self-contained HTML page about a run: curves, AP by class and size, precision and recall, images, config.

    samdetr report --input output/demo --output output/demo/report.html
    samdetr report --input output/demo --weights output/demo/model_best.pth --max-images 500 --output report.html

It evaluates the checkpoint (by default the run's model_final.pth) on the first of the run's DATASETS.TEST. The best and
worst images are determined by F1 at IoU 0.5, counting detections above --score-threshold.
"""

import argparse
import base64
import html
import io
import math
import time
from pathlib import Path

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.collect_env import collect_env_info
from matplotlib.figure import Figure
from PIL import Image

from ..checks import check_config
from ..data import register_datasets
from ..engine import evaluate_images
from ..engine.evaluation import ImageEvaluation
from ..errors import UserError
from ..predictor import Predictor
from ..visualization import draw_beside_truth, draw_curves, draw_pairs, read_metrics
from .common import SCORE_THRESHOLD, add_model_arguments, load_predictor, output_file, score

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


def picture(array: np.ndarray) -> str:
    """Return an image as an HTML element that carries its own data."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="JPEG", quality=85)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def drawing(figure: Figure) -> str:
    """Return a figure as an HTML element that carries its own SVG data."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    encoded = base64.b64encode(text[text.index("<svg") :].encode()).decode()
    return f'<img src="data:image/svg+xml;base64,{encoded}">'


def precision_recall(evaluation: ImageEvaluation) -> Figure:
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


def class_table(names: list[str], evaluation: ImageEvaluation, records: list[dict]) -> str:
    counts = np.zeros(len(names), int)
    for record in records:
        for annotation in record.get("annotations", []):
            counts[annotation["category_id"]] += 1
    class_ap = [
        evaluation.results.get(f"AP-{name}", evaluation.results["AP"] if len(names) == 1 else math.nan)
        for name in names
    ]
    rows = sorted(zip(names, counts, class_ap), key=lambda row: -1 if math.isnan(row[2]) else -row[2])
    body = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{count}</td><td>{percent(ap)}</td>"
        f'<td class="bar"><i style="width:{0 if math.isnan(ap) else ap:.1f}%"></i></td></tr>'
        for name, count, ap in rows
    )
    return f"<table><tr><th>class</th><th>boxes</th><th>AP</th><th></th></tr>{body}</table>"


def images(records: list[dict], found: dict[int, Instances], names: list[str], threshold: float) -> str:
    pairs = [draw_beside_truth(record, found[record["image_id"]], names, threshold) for record in records]
    return picture(draw_pairs(pairs, columns=2))


def write_page(arguments: argparse.Namespace, predictor: Predictor, weights: Path) -> str:
    """Evaluate, and return the page's HTML."""
    name = predictor.cfg.DATASETS.TEST[0]
    evaluation = evaluate_images(
        predictor.cfg,
        predictor.model,
        name,
        arguments.max_images,
        arguments.score_threshold,
        predictor.class_names if predictor.knows_classes else None,
    )
    records, found = evaluation.records, evaluation.detections
    stats = {key: evaluation.results[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    names = predictor.class_names
    ranked = sorted(records, key=lambda record: evaluation.quality[record["image_id"]])
    number = min(arguments.num_examples, -(-len(ranked) // 2))
    worst, best = ranked[:number], ranked[::-1][:number]
    metrics = Path(arguments.input) / "metrics.json"
    curves = drawing(draw_curves({"this run": read_metrics(metrics)})) if metrics.exists() else "No metrics.json."
    quality = np.mean(list(evaluation.quality.values()))
    title = html.escape(str(arguments.input))
    sections = [
        f"<h1>{title}</h1><p class=quiet>{html.escape(str(weights))} on {len(records)} images of {html.escape(name)}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}</p><div class=numbers>{number_boxes(stats)}"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="RUN", help="the run's OUTPUT_DIR")
    add_model_arguments(parser, required=False)
    parser.add_argument("--output", required=True, help="HTML file")
    parser.add_argument("--score-threshold", type=score, default=SCORE_THRESHOLD)
    parser.add_argument("--num-examples", type=int, default=8, help="best and worst images to show of each")
    parser.add_argument("--max-images", type=int, help="evaluate the first N images only")


def main(arguments: argparse.Namespace) -> None:
    if not Path(arguments.input).is_dir():
        raise UserError(f"--input {arguments.input}: there is no such folder; name a run's OUTPUT_DIR.")
    if arguments.num_examples < 1 or (arguments.max_images is not None and arguments.max_images < 1):
        raise UserError("--num-examples and --max-images must be 1 or more.")
    output = output_file(arguments.output, (".html",))
    weights = Path(arguments.weights or Path(arguments.input) / "model_final.pth")
    if not weights.exists():
        raise UserError(f"{weights}: there is no such file; name a checkpoint with --weights.")
    predictor = load_predictor(arguments, str(weights))
    register_datasets(predictor.cfg)
    known = predictor.class_names if predictor.knows_classes else None
    check_config(predictor.cfg, training=False, weights=False, class_names=known)
    page = write_page(arguments, predictor, weights)
    output.write_text(page, encoding="utf-8", errors="replace")
    print(f"{output}: {len(page) / 2**20:.1f} MiB")
