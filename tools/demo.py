#!/usr/bin/env python
"""Train the small model on the embedded dataset, evaluate it, and draw what it finds (about ten minutes on two cores).

tools/demo.py [--output output/demo] [KEY VALUE ...]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

import samdetr
from samdetr.data import build_test_loader
from samdetr.visualization import draw_detections_sheet

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/sam_detr_digits.yaml"
SCORE_THRESHOLD = 0.3  # focal loss gives lower scores than softmax


def draw(output: Path, num_images: int = 16) -> Path:
    """Draw predictions of ``model_final.pth`` beside the ground truth of the first validation images."""
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    cfg.merge_from_file(str(output / "config.yaml"))
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(output / "model_final.pth"))
    name = cfg.DATASETS.TEST[0]
    records = {record["image_id"]: record for record in DatasetCatalog.get(name)[:num_images]}
    found = {}
    for inputs in build_test_loader(cfg, name):
        if len(found) == len(records):
            break
        with torch.no_grad():
            found[inputs[0]["image_id"]] = model(inputs)[0]["instances"]
    predictions = [found[image_id] for image_id in records]
    sheet = draw_detections_sheet(list(records.values()), predictions, MetadataCatalog.get(name), SCORE_THRESHOLD)
    path = output / "predictions.png"
    Image.fromarray(sheet).save(path)
    return path


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
    status = subprocess.run(command).returncode
    if status:
        sys.exit(status)
    minutes = (time.perf_counter() - started) / 60
    picture = draw(output)
    metrics = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    ap = next(entry["bbox/AP"] for entry in reversed(metrics) if "bbox/AP" in entry)
    print(
        f"""
Box AP on digits_val: {ap:.1f}, after {minutes:.1f} minutes of training and evaluation.

  {picture}            ground truth (left) and predictions (right)
  {output}/metrics.json               losses and AP over the run, one JSON object a line
  {output}/model_final.pth            the trained model
  {output}/model_best.pth             the weights of the best evaluation
  {output}/config.yaml, log.txt       the full config, the full log

Next:
  {sys.executable} train_net.py --config-file {CONFIG} --eval-only MODEL.WEIGHTS {output}/model_final.pth
  tensorboard --logdir {output}
  README.md: training on COCO and on your own data"""
    )


if __name__ == "__main__":
    main()
