#!/usr/bin/env python
"""Measure how much evaluating images in padded batches changes AP, compared with one image at a time.

    tools/measure/padding.py --weights output/demo/model_final.pth

The images of DATASETS.TEST are cut at the right and the bottom to random sizes (80 to 100 % of each side), with their boxes,
and evaluated one by one and in batches, where smaller images are padded to the largest.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from PIL import Image

from samdetr.cli.common import add_model_arguments, load_predictor, run
from samdetr.data import load_records, register_datasets
from samdetr.engine import Trainer
from samdetr.engine.trainer import build_evaluators


def write_cut_images(dataset: str, folder: Path) -> None:
    """Cut a registered dataset's images and write them as a COCO-format dataset, ``cut.json``, to a folder."""
    rng = np.random.RandomState(0)
    images, annotations, records = [], [], load_records(dataset)
    names = MetadataCatalog.get(dataset).thing_classes
    for record in records:
        width, height = (int(side * rng.uniform(0.8, 1)) for side in (record["width"], record["height"]))
        file_name = f"{len(images)}.png"
        Image.open(record["file_name"]).crop((0, 0, width, height)).save(folder / file_name)
        images.append({"id": len(images) + 1, "file_name": file_name, "width": width, "height": height})
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            w, h = min(x1, width) - x0, min(y1, height) - y0
            if w < 0.5 * (x1 - x0) or h < 0.5 * (y1 - y0):
                continue  # too little of it is left
            entry = {"id": len(annotations) + 1, "image_id": len(images), "category_id": annotation["category_id"] + 1}
            annotations.append(
                {**entry, "bbox": [x0, y0, w, h], "area": w * h, "iscrowd": annotation.get("iscrowd", 0)}
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "cut.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    arguments = parser.parse_args()
    predictor = load_predictor(arguments)
    cfg = predictor.cfg
    cfg.DATALOADER.NUM_WORKERS = 0
    register_datasets(cfg)
    class_names = predictor.class_names if predictor.knows_classes else None
    with tempfile.TemporaryDirectory() as folder:
        write_cut_images(cfg.DATASETS.TEST[0], Path(folder))
        register_coco_instances("cut", {}, f"{folder}/cut.json", folder)
        cfg.DATASETS.TEST = ("cut",)
        # Do not resize the images, so that their sizes differ.
        cfg.INPUT.MIN_SIZE_TEST = 0
        cfg.OUTPUT_DIR = folder
        for batch in (1, arguments.batch):
            cfg.TEST.IMS_PER_BATCH = batch
            with contextlib.redirect_stdout(sys.stderr):
                results = Trainer.test(cfg, predictor.model, build_evaluators(Trainer, cfg, class_names))
            print(f"{batch} per batch: AP {results['bbox']['AP']:.2f}, AP50 {results['bbox']['AP50']:.2f}")


if __name__ == "__main__":
    run(main)
