"""Write one self-contained HTML page about a run: curves, AP by class and size, score thresholds, confusion, errors, images.

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
from detectron2.utils.collect_env import collect_env_info
from matplotlib.figure import Figure

from ..analysis import AP_NAMES, read_results
from ..checkpoint.checkpoint import write_atomically
from ..checks import check_config
from ..data import register_datasets
from ..engine import evaluate_images
from ..engine.evaluation import ImageEvaluation
from ..errors import UserError
from ..predictor import Predictor
from ..visualization import analysis_sections, draw_curves, read_metrics, report_page
from .common import SCORE_THRESHOLD, add_model_arguments, load_predictor, output_file, score


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


def write_page(arguments: argparse.Namespace, predictor: Predictor, weights: Path) -> str:
    """Evaluate, and return the page's HTML."""
    name = predictor.cfg.DATASETS.TEST[0]
    metrics = Path(arguments.input) / "metrics.json"
    curves = drawing(draw_curves({"this run": read_metrics(metrics)})) if metrics.exists() else "No metrics.json."
    evaluation = evaluate_images(
        predictor.cfg,
        predictor.model,
        name,
        arguments.max_images,
        arguments.score_threshold,
        predictor.class_names if predictor.knows_classes else None,
    )
    records, stats = evaluation.records, {key: evaluation.results[key] for key in AP_NAMES}
    quality = np.mean(list(evaluation.quality.values()))
    results = read_results(evaluation.ground_truth, evaluation.coco_detections)
    top = (
        f"<p class=quiet>{html.escape(str(weights))} on {len(records)} images of {html.escape(name)}, "
        f"{time.strftime('%Y-%m-%d %H:%M')}</p><div class=numbers>{number_boxes(stats)}"
        f'<div class="number">F1 at {arguments.score_threshold}<b>{100 * quality:.1f}</b></div></div>'
    )
    sections = {
        "Training": curves,
        "Precision and recall": drawing(precision_recall(evaluation)),
        **analysis_sections(
            results,
            evaluation.class_ap,
            stats,
            records,
            evaluation.quality,
            arguments.score_threshold,
            arguments.num_examples,
        ),
        "Config": f"<details><summary>All keys</summary><pre>{html.escape(predictor.cfg.dump())}</pre></details>",
        "Environment": f"<details><summary>Versions</summary><pre>{html.escape(collect_env_info())}</pre></details>",
    }
    return report_page(str(arguments.input), top, sections)


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
    try:
        with write_atomically(output) as file:
            file.write(page.encode(errors="replace"))
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}).", argument="output") from error
    print(f"{output}: {len(page) / 2**20:.1f} MiB")
