"""Detect objects in images, folders of images, and videos; draw them, and write them down in COCO's format.

    samdetr predict --weights output/demo/model_final.pth --input datasets/samdetr_digits_v1/val --output output/predictions
    samdetr predict --weights model_final.pth --input street.jpg holiday/ film.mp4 --output predictions
    samdetr predict --weights bare.pth --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --input street.jpg \\
        --output predictions
    samdetr predict --weights model_final.pth --input film.mp4 --track --output predictions

The output folder gets a drawing of every input under its own name, and predictions.json, a list in the format of COCO's
results: every detection, even below the threshold, with ``image_id`` (the file's number if all files are named by numbers,
else 1, 2, ... in the order of the inputs), ``file_name``, ``category_id`` (the training dataset's own id), ``bbox`` (x, y,
width, height in pixels), ``score``, and for videos ``frame``; of videos, only what is drawn. A file that cannot be read is
reported, the others are done all the same, and the exit status is 1.

With --track (pip install trackers), entries of videos have ``track_id``, which is the same for one object in all frames of a
video, and null for what is in no track, as an object in the first frame that shows it; drawings show it as #0, #1, ...

Started by torchrun or srun, the processes share the inputs, and write one result:

    torchrun --nproc-per-node 8 -m samdetr predict --weights model_final.pth --input photographs/ --output predictions
"""

import argparse
import contextlib
import heapq
import itertools
import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from PIL import Image
from tqdm import tqdm

from ..errors import UserError, import_extra
from ..object_tracking import ObjectTracker
from ..predictor import Predictor, list_images
from ..visualization import draw_detections
from .common import (
    IMAGE_SUFFIXES,
    SCORE_THRESHOLD,
    VIDEO_SUFFIXES,
    add_model_arguments,
    drawing_names,
    load_predictor,
    output_folder,
    score,
)
from .launch import joined_processes, was_launched


def image_ids(files: list[Path]) -> dict[Path, int]:
    """Return the image id of each file: its name, if all files are named by numbers as COCO's are; else its position."""
    stems = [file.stem for file in files]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return {file: int(file.stem) for file in files}
    return {file: number for number, file in enumerate(files, start=1)}


def as_coco(instances: Instances, predictor: Predictor, image_id: int, **extra) -> list[dict]:
    """Turn detections into entries of COCO's results."""
    entries = instances_to_coco_json(instances, image_id)
    for entry in entries:
        entry["category_id"] = predictor.category_ids[entry["category_id"]]
        entry.update(extra)
    if instances.has("track_ids"):
        for entry, number in zip(entries, instances.track_ids.tolist()):
            entry["track_id"] = number if number >= 0 else None
    return entries


def drawing_suffix(file: Path) -> str:
    if file.suffix.lower() in VIDEO_SUFFIXES:
        return ".mp4"
    return ".png" if file.suffix.lower() == ".png" else ".jpg"


class ResultsPart:
    """The detections of one process, an entry per line, in a file of its own, so that any number of them needs no memory."""

    def __init__(self, folder: Path, rank: int):
        self.path = part_path(folder, rank)
        self.file = self.path.open("w")

    def write(self, position: int, entries: list[dict]) -> None:
        """Write the entries of the input at this position."""
        self.file.writelines(f"{position}\t{json.dumps(entry)}\n" for entry in entries)

    def close(self) -> None:
        self.file.close()


def part_path(folder: Path, rank: int) -> Path:
    return folder / f"predictions.json.part{rank}"


def merge_parts(folder: Path, number: int) -> Path:
    """Merge the parts of all processes into predictions.json, a list in the order of the inputs.

    The file appears under its name when it is complete.
    """
    path, unfinished = folder / "predictions.json", folder / "predictions.json.unfinished"
    parts = [part_path(folder, rank) for rank in range(number)]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(part.open()) for part in parts]
        output = stack.enter_context(unfinished.open("w"))
        output.write("[")
        for count, line in enumerate(heapq.merge(*files, key=lambda line: int(line.partition("\t")[0]))):
            output.write(("," if count else "") + "\n" + line.partition("\t")[2].rstrip())
        output.write("\n]\n")
    unfinished.replace(path)
    for part in parts:
        part.unlink()
    return path


class Prediction:
    """Go through this process's share of the inputs, draw what was found, and write it down."""

    def __init__(self, predictor: Predictor, files: list[Path], names: dict[Path, Path], arguments: argparse.Namespace):
        self.predictor = predictor
        self.names = names
        self.threshold = arguments.score_threshold
        self.draw = not arguments.no_drawings
        self.track = arguments.track
        self.batch_size = arguments.batch_size
        self.folder = Path(arguments.output)
        self.ids = image_ids(files)
        self.positions = {file: position for position, file in enumerate(files)}
        rank, number = comm.get_rank(), comm.get_world_size()
        videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
        self.videos = videos[rank::number]
        self.video = import_module(".video", __package__) if videos else None  # it needs a package of its own
        self.images = [file for file in files if file not in set(videos)][rank::number]
        self.share = sorted([*self.images, *self.videos], key=self.positions.get)
        self.results = ResultsPart(self.folder, rank)
        self.confident = 0
        self.failed: list[str] = []

    def run(self) -> None:
        quiet = not self.images or not comm.is_main_process()
        progress = tqdm(total=len(self.images), unit="image", disable=quiet)
        for are_videos, group in itertools.groupby(self.share, key=set(self.videos).__contains__):
            files = list(group)
            if are_videos:
                for file in files:
                    self.run_video(file)
                continue
            for start in range(0, len(files), self.batch_size):
                batch = files[start : start + self.batch_size]
                self.run_images(batch)
                progress.update(len(batch))
        progress.close()

    def run_images(self, files: list[Path]) -> None:
        """Detect in a batch; if that fails, in each image by itself, so that only the bad ones are left out."""
        try:
            images = [self.predictor.read(file) for file in files]
            found = self.predictor(images, self.batch_size)
        except Exception as error:
            if len(files) == 1:
                self.report(files[0], error)
                return
            for file in files:
                self.run_images([file])
            return
        for file, image, instances in zip(files, images, found):
            self.keep(instances, file)
            if self.draw:
                path = self.folder / self.names[file]
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    drawing = draw_detections(image, instances, self.predictor.class_names, self.threshold)
                    Image.fromarray(drawing).save(path)
                except Exception as error:
                    self.report(file, error)

    def run_video(self, file: Path) -> None:
        """Detect in a video's frames; one that fails does not stop the others."""
        try:
            self.run_frames(file)
        except Exception as error:
            self.report(file, error)

    def run_frames(self, file: Path) -> None:
        path = self.folder / self.names[file]
        path.parent.mkdir(parents=True, exist_ok=True)
        expected, rate = self.video.length_and_rate(file)
        writer = self.video.VideoWriter(path, rate)
        tracker = ObjectTracker(score_threshold=self.threshold, frame_rate=rate) if self.track else None
        number = 0
        try:
            for frame in tqdm(self.video.read_frames(file), desc=file.name, total=expected or None, unit="frame"):
                instances = self.predictor(frame)
                shown = tracker(instances) if tracker else instances[instances.scores >= self.threshold]
                self.keep(shown, file, frame=number)
                if self.draw:
                    writer.write(draw_detections(frame, shown, self.predictor.class_names))
                number += 1
        finally:
            writer.close()
        if number < expected - 1:  # some containers count one too many
            raise UserError(f"{file} breaks off after frame {number} of {expected}; the frames up to there are done.")

    def report(self, file: Path, error: Exception) -> None:
        text = str(error) if isinstance(error, UserError) else f"{file}: {type(error).__name__}: {error}"
        tqdm.write(f"error: {text}", file=sys.stderr)
        self.failed.append(str(file))

    def keep(self, instances: Instances, file: Path, **extra) -> None:
        """Write detections down, and count those above the threshold."""
        entries = as_coco(instances, self.predictor, self.ids[file], file_name=str(file), **extra)
        self.results.write(self.positions[file], entries)
        self.confident += int((instances.scores >= self.threshold).sum())


def files_and_names(arguments: argparse.Namespace, folder: Path) -> tuple[list[Path], dict[Path, Path]]:
    """Return the input files, and the names of their drawings, none of which is an input."""
    files = list_images(arguments.input, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    named = {Path(path).resolve() for path in arguments.input}
    output = folder.resolve()
    if output not in named and any(output.is_relative_to(path) for path in named):  # earlier drawings are not inputs
        files = [file for file in files if file.resolve() in named or not file.resolve().is_relative_to(output)]
        if not files:
            raise UserError(f"there is nothing but earlier drawings in {folder}: name other inputs.", argument="input")
    names = drawing_names(files, arguments.input, drawing_suffix)
    inputs = {file.resolve() for file in files}
    for name in names.values():
        if (folder / name).resolve() in inputs and not arguments.no_drawings:
            raise UserError(
                f"{folder} would overwrite the input {folder / name}: name another folder.", argument="output"
            )
    return files, names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders, videos")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for drawings and predictions.json")
    parser.add_argument("--score-threshold", type=score, default=SCORE_THRESHOLD, help="of what is drawn, in [0, 1]")
    parser.add_argument("--batch-size", type=int, default=1, help="more is faster on a GPU, and pads smaller images")
    parser.add_argument("--max-pixels", type=int, help="refuse larger images (default: INPUT.MAX_PIXELS of the config)")
    parser.add_argument("--no-drawings", action="store_true", help="write predictions.json only")
    parser.add_argument("--track", action="store_true", help="follow the objects of videos from frame to frame")


def main(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}: it must be 1 or more.")
    files, names = files_and_names(arguments, Path(arguments.output))
    if arguments.track:
        if not any(file.suffix.lower() in VIDEO_SUFFIXES for file in files):
            raise UserError("--track follows the objects of videos, and there is none: name one.", argument="input")
        import_extra("trackers", "trackers")
    folder = output_folder(arguments.output)
    if was_launched():
        cuda = torch.cuda.is_available() and arguments.device != "cpu"
        with joined_processes(cuda, until_the_last=True):
            return predict(files, names, folder, arguments)
    return predict(files, names, folder, arguments)


def predict(files: list[Path], names: dict[Path, Path], folder: Path, arguments: argparse.Namespace) -> int:
    """Do this process's share of the work; the first process writes the result. Return the exit status."""
    options = ["INPUT.MAX_PIXELS", arguments.max_pixels] if arguments.max_pixels is not None else []
    prediction = Prediction(load_predictor(arguments, options=options), files, names, arguments)
    try:
        prediction.run()
    except BaseException:  # also when it is interrupted: what was found is written
        prediction.results.close()
        if comm.get_world_size() == 1:
            merge_parts(folder, 1)
        raise
    prediction.results.close()
    done = len(prediction.images) + len(prediction.videos) - len(prediction.failed)
    shares = comm.gather((done, prediction.confident, len(prediction.failed)))
    if not comm.is_main_process():
        return 0
    path = merge_parts(folder, comm.get_world_size())
    done, confident, failed = (sum(share) for share in zip(*shares))
    print(f"{done} files, {confident} detections with a score of {arguments.score_threshold} or more: {path}")
    if failed:
        print(f"{failed} files could not be done, see above.", file=sys.stderr)
    return 1 if failed else 0
