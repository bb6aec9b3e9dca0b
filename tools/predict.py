#!/usr/bin/env python
"""Detect objects in images, folders of images, and videos; draw them, and write them down in COCO's format.

    tools/predict.py --weights output/demo/model_final.pth --input datasets/digits/val --output output/predictions
    tools/predict.py --weights model_final.pth --input street.jpg holiday/ film.mp4 --output predictions
    tools/predict.py --weights converted.pth --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --input street.jpg \\
        --output predictions

The output folder gets a drawing of every input under its own name, and predictions.json, a list in the format of COCO's
results: every detection, below the threshold too, with ``image_id`` (the file's number if all files are named by numbers,
else 1, 2, ... in the order of the inputs), ``file_name``, ``category_id`` (the training dataset's own id), ``bbox`` (x, y,
width, height in pixels), ``score``, and for videos ``frame``. A file that cannot be read is reported, the others are
done all the same, and the exit status is 1.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from common import (
    IMAGE_SUFFIXES,
    SCORE_THRESHOLD,
    VIDEO_SUFFIXES,
    add_model_arguments,
    load_predictor,
    run,
)
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

from samdetr.errors import UserError
from samdetr.predictor import Predictor, list_images, read_image
from samdetr.visualization import draw_detections


def output_names(files: list[Path], inputs: list[str]) -> dict[Path, Path]:
    """Where each file's drawing goes: its path below the folder that was named, made unique."""
    folders = [Path(path) for path in inputs if Path(path).is_dir()]
    taken: set[Path] = set()
    names = {}
    for file in files:
        below = next((file.relative_to(folder) for folder in folders if file.is_relative_to(folder)), Path(file.name))
        name, number = below, 1
        while name in taken:
            number += 1
            name = below.with_name(f"{below.stem}-{number}{below.suffix}")
        taken.add(name)
        names[file] = name
    return names


def image_ids(files: list[Path]) -> dict[Path, int]:
    """COCO names its files by their ids; other files are numbered."""
    stems = [file.stem for file in files]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return {file: int(file.stem) for file in files}
    return {file: number for number, file in enumerate(files, start=1)}


def as_coco(instances: Instances, predictor: Predictor, image_id: int, **extra) -> list[dict]:
    """Detections as entries of COCO's results."""
    entries = instances_to_coco_json(instances, image_id)
    for entry in entries:
        entry["category_id"] = predictor.category_ids[entry["category_id"]]
        entry.update(extra)
    return entries


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, (H, W, 3) uint8, RGB."""
    capture = cv2.VideoCapture(str(path))
    try:
        good, frame = capture.read()
        if not good:
            raise UserError(f"{path} is not a video that can be read.")
        while good:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            good, frame = capture.read()
    finally:
        capture.release()


class VideoWriter:
    """Writes frames to an MP4 file of the source's rate; the first frame decides the size."""

    def __init__(self, path: Path, source: Path):
        capture = cv2.VideoCapture(str(source))
        self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
        capture.release()
        self.path = path
        self.writer = None

    def write(self, picture: np.ndarray) -> None:
        height, width = (side // 2 * 2 for side in picture.shape[:2])  # the codec wants even sides
        if self.writer is None:
            fourcc = cv2.VideoWriter_fourcc(*"mp4v")
            self.writer = cv2.VideoWriter(str(self.path), fourcc, self.rate, (width, height))
        self.writer.write(cv2.cvtColor(np.ascontiguousarray(picture[:height, :width]), cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()


class Prediction:
    """Goes through the inputs and keeps what was found."""

    def __init__(self, predictor: Predictor, arguments: argparse.Namespace):
        self.predictor = predictor
        self.threshold = arguments.score_threshold
        self.draw = not arguments.no_drawings
        self.batch_size = arguments.batch_size
        self.folder = Path(arguments.output)
        files = list_images(arguments.input, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        self.names = output_names(files, arguments.input)
        self.ids = image_ids(files)
        self.images = [file for file in files if file.suffix.lower() not in VIDEO_SUFFIXES]
        self.videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        self.detections: list[dict] = []
        self.failed: list[str] = []

    def run(self) -> None:
        progress = tqdm(total=len(self.images), unit="image", disable=not self.images)
        for start in range(0, len(self.images), self.batch_size):
            batch = {}
            for file in self.images[start : start + self.batch_size]:
                try:
                    batch[file] = read_image(file)
                except UserError as error:
                    self.report(error)
            found = self.predictor(batch.values(), self.batch_size)
            for (file, image), instances in zip(batch.items(), found):
                self.detections += as_coco(instances, self.predictor, self.ids[file], file_name=str(file))
                if self.draw:
                    path = self.folder / self.names[file].with_suffix(".png" if file.suffix == ".png" else ".jpg")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    drawing = draw_detections(image, instances, self.predictor.class_names, self.threshold)
                    Image.fromarray(drawing).save(path)
            progress.update(min(self.batch_size, len(self.images) - start))
        progress.close()
        for file in self.videos:
            try:
                self.run_video(file)
            except UserError as error:
                self.report(error)

    def run_video(self, file: Path) -> None:
        path = self.folder / self.names[file].with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = VideoWriter(path, file)
        try:
            for number, frame in enumerate(tqdm(read_frames(file), desc=file.name, unit="frame")):
                instances = self.predictor(frame)
                entries = as_coco(instances, self.predictor, self.ids[file], file_name=str(file), frame=number)
                self.detections += entries
                if self.draw:
                    writer.write(draw_detections(frame, instances, self.predictor.class_names, self.threshold))
        finally:
            writer.close()

    def report(self, error: UserError) -> None:
        tqdm.write(f"error: {error}", file=sys.stderr)
        self.failed.append(str(error))

    def save(self) -> Path:
        path = self.folder / "predictions.json"
        path.write_text(json.dumps(self.detections))
        return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders, videos")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for drawings and predictions.json")
    parser.add_argument("--score-threshold", type=float, default=SCORE_THRESHOLD, help="of what is drawn, in [0, 1]")
    parser.add_argument("--batch-size", type=int, default=1, help="more is faster on a GPU, and pads smaller images")
    parser.add_argument("--no-drawings", action="store_true", help="write predictions.json only")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}: it must be 1 or more.")
    if Path(arguments.output).is_file():
        raise UserError(f"--output {arguments.output} is a file; name a folder.")
    prediction = Prediction(load_predictor(arguments), arguments)
    prediction.folder.mkdir(parents=True, exist_ok=True)
    try:
        prediction.run()
    finally:  # also when it is interrupted: what was found is written
        path = prediction.save()
    confident = sum(entry["score"] >= arguments.score_threshold for entry in prediction.detections)
    done = len(prediction.images) + len(prediction.videos) - len(prediction.failed)
    print(f"{done} files, {confident} detections with a score of {arguments.score_threshold} or more: {path}")
    if prediction.failed:
        print(f"{len(prediction.failed)} files could not be read, see above.", file=sys.stderr)
    return 1 if prediction.failed else 0


if __name__ == "__main__":
    run(main)
