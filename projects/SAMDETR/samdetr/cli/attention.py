"""Draw what each decoder layer looks at: reference box, representative keypoints, Gaussians, and every head's attention.

    samdetr attention --weights output/demo/model_final.pth --input datasets/samdetr_digits_v1/val/000001.jpg \\
        --output output/attention
    samdetr attention --weights sam_detr.pth --compare-weights detr.pth --input street.jpg --output attention
    samdetr attention --weights sam_detr.pth --input street.jpg --queries 17 203 --separate --output attention

For every image and chosen query one sheet: a row for each decoder layer with the level it attends to, the image with the
reference box that the layer starts from and all keypoints, then each head's attention (bright) with its keypoint (dot) and,
with SMCA, the line where its Gaussian has fallen to half. Without --queries, the queries of the best detections are drawn.
With --compare-weights, the other model's sheet for the same object (IoU of at least 0.3) stands beside it.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import Instances, pairwise_iou
from PIL import Image

from ..errors import UserError, one_line
from ..predictor import Predictor, list_images, load
from ..visualization import RecordedLayer, draw_attention, draw_head, draw_pairs, record_attention
from .common import (
    IMAGE_SUFFIXES,
    SCORE_THRESHOLD,
    add_model_arguments,
    drawing_names,
    load_predictor,
    output_folder,
    score,
)

SAME_OBJECT = 0.3  # IoU above which two models' detections are of the same object


def look_at(predictor: Predictor, image: np.ndarray) -> tuple[Instances, list[RecordedLayer]]:
    """Return the detections in an image, and what the decoder looked at."""
    with record_attention(predictor.model) as layers:
        instances = predictor(image)
    return instances, layers


def choose(instances: Instances, arguments: argparse.Namespace) -> list[tuple[int, int | None]]:
    """Choose the queries to draw, each with the best of its detections."""
    first: dict[int, int] = {}
    for detection, query in enumerate(instances.query_indices.tolist()):
        first.setdefault(query, detection)
    if arguments.queries:
        return [(query, first.get(query)) for query in arguments.queries]
    good = [(q, d) for q, d in first.items() if instances.scores[d] >= arguments.score_threshold]
    return good[: arguments.max_queries]


def describe(query: int, detection: int | None, instances: Instances, predictor: Predictor) -> str:
    if detection is None:
        return f"query {query}"
    name = predictor.class_names[instances.pred_classes[detection]]
    return f"query {query}: {name} {instances.scores[detection]:.2f}"


def same_object(instances: Instances, detection: int | None, others: Instances) -> int | None:
    """Return the other model's detection of the same object: the largest overlap, of the same class if there is one."""
    if detection is None or not len(others):
        return None
    overlap = pairwise_iou(instances.pred_boxes[detection], others.pred_boxes)[0]
    alike = torch.where(others.pred_classes == instances.pred_classes[detection], overlap, 0.0)
    best = (alike if alike.max() >= SAME_OBJECT else overlap).argmax()
    return int(best) if overlap[best] >= SAME_OBJECT else None


def draw_query(query, detection, looked, other, image, arguments, predictors) -> tuple[np.ndarray, str]:
    """Draw one query's sheet, with the other model's beside it; return it with its title."""
    instances, layers = looked
    title = describe(query, detection, instances, predictors[0])
    sheet = draw_attention(image, layers, query, title)
    if other is None:
        return sheet, title
    match = same_object(instances, detection, other[0])
    if match is None:
        return sheet, f"{title} (the other model does not find it)"
    matched = int(other[0].query_indices[match])
    caption = describe(matched, match, other[0], predictors[1])
    beside = draw_attention(image, other[1], matched, f"{Path(arguments.compare_weights).stem}, {caption}")
    return draw_pairs([(sheet, beside)], columns=1), f"{title} | {caption}"


def draw_file(file: Path, name: Path, folder: Path, arguments: argparse.Namespace, predictors: list) -> None:
    """Draw all sheets of one image, named after ``name``."""
    image = predictors[0].read(file)
    looked = look_at(predictors[0], image)
    other = look_at(predictors[1], image) if len(predictors) > 1 else None
    queries = choose(looked[0], arguments)
    if not queries:
        print(
            one_line(
                f"{file}: no detection with a score of {arguments.score_threshold} or more; lower --score-threshold."
            )
        )
    (folder / name.parent).mkdir(parents=True, exist_ok=True)
    for query, detection in queries:
        sheet, title = draw_query(query, detection, looked, other, image, arguments, predictors)
        path = folder / name.with_name(f"{name.stem}-query{query}.png")
        Image.fromarray(sheet).save(path)
        print(one_line(f"{path}: {title}"))
        if arguments.separate:
            for i, layer in enumerate(looked[1]):
                for head in range(layer.query.keypoints.shape[2]):
                    single = path.with_name(f"{path.stem}-layer{i + 1}-head{head + 1}.png")
                    Image.fromarray(draw_head(image, layer, query, head)).save(single)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--compare-weights", help="checkpoint of another model to draw beside it")
    parser.add_argument("--compare-config-file", help="its config, if it carries none")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, or folders of images")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the sheets")
    parser.add_argument("--queries", type=int, nargs="+", help="indices of the queries to draw")
    parser.add_argument(
        "--max-queries", type=int, default=4, help="maximum number of queries per image, without --queries"
    )
    parser.add_argument("--score-threshold", type=score, default=SCORE_THRESHOLD, help="of the detections to draw")
    parser.add_argument("--separate", action="store_true", help="also one file for each layer and head")


def main(arguments: argparse.Namespace) -> int:
    folder = output_folder(arguments.output)
    files = list_images(arguments.input, IMAGE_SUFFIXES)
    predictors = [load_predictor(arguments)]
    number = predictors[0].cfg.MODEL.SAMDETR.NUM_QUERIES
    if arguments.max_queries < 1:
        raise UserError(f"--max-queries is {arguments.max_queries}: it must be 1 or more.")
    if any(not 0 <= query < number for query in arguments.queries or ()):
        raise UserError(f"--queries {arguments.queries}: the model's {number} queries are numbered from 0.")
    if arguments.compare_weights:
        config = arguments.compare_config_file
        try:
            predictors.append(load(arguments.compare_weights, config_file=config, device=arguments.device))
        except UserError as error:
            option = "--compare-config-file" if error.argument == "config_file" else "--compare-weights"
            raise UserError(f"{option}: {error}") from error
    failed = 0
    for file, name in drawing_names(files, arguments.input, lambda file: ".png").items():
        try:
            draw_file(file, name, folder, arguments, predictors)
        except UserError as error:  # one bad file does not stop the others
            print(f"error: {error}", file=sys.stderr)
            failed += 1
    return 1 if failed else 0
