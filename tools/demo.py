#!/usr/bin/env python
"""Train the small model on the embedded dataset, evaluate it, and draw what it finds (7 to 22 minutes on two cores).

tools/demo.py [--output output/demo] [KEY VALUE ...]
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

import samdetr
from samdetr.cli.common import SCORE_THRESHOLD, run
from samdetr.data import load_records, register_datasets
from samdetr.visualization import draw_beside_truth, draw_pairs

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/sam_detr_plus_digits.yaml"


def train(command: list[str]) -> int:
    """Run a command, and return its exit status; a signal is passed on, and then waited for, since training saves its step."""
    training = subprocess.Popen(command)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: training.send_signal(number)) for number in numbers]
    try:
        return training.wait()
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def draw(predictor: samdetr.Predictor, path: Path, num_images: int = 16) -> None:
    """Draw predictions beside the ground truth of the first validation images."""
    register_datasets(predictor.cfg)
    records = load_records(predictor.cfg.DATASETS.TEST[0], predictor.class_names)
    pairs = [
        draw_beside_truth(record, predictor(record["file_name"]), predictor.class_names, SCORE_THRESHOLD)
        for record in records[:num_images]
    ]
    Image.fromarray(draw_pairs(pairs)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for everything the run writes")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="config options, KEY VALUE")
    arguments = parser.parse_args()
    output = arguments.output
    if output.exists():
        earlier = output.with_name(f"{output.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        output.rename(earlier)
        print(f"The earlier demo is now in {earlier}.")
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(ROOT / CONFIG)]
    command += ["OUTPUT_DIR", str(output), *arguments.options]
    status = train(command)
    if status:
        sys.exit(status)
    minutes = (time.perf_counter() - started) / 60
    predictor, picture = samdetr.load(output / "model_final.pth", device="cpu"), output / "predictions.png"
    draw(predictor, picture)
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    ap = next(entry["bbox/AP"] for entry in reversed(metrics) if "bbox/AP" in entry)
    print(
        f"""
Box AP on {predictor.cfg.DATASETS.TEST[0]}: {ap:.1f}, after {minutes:.1f} minutes of training and evaluation.

  {picture}            ground truth (left) and predictions (right)
  {output}/metrics.json               losses and AP over the run, one JSON object per line
  {output}/model_final.pth            the trained model
  {output}/model_best.pth             the weights of the best evaluation
  {output}/config.yaml, log.txt       the full config, the full log

Next:
  {sys.executable} train_net.py --config-file {CONFIG} --eval-only MODEL.WEIGHTS {output}/model_final.pth
  tools/predict.py --weights {output}/model_final.pth --input IMAGE_OR_FOLDER --output predictions
  tools/visualize_attention.py --weights {output}/model_final.pth --input IMAGE --output attention
  tools/report.py --input {output} --output {output}/report.html
  tensorboard --logdir {output}
  README.md: training on COCO and on your own data"""
    )


if __name__ == "__main__":
    run(main)
