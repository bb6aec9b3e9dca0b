#!/usr/bin/env python
"""Draw what each decoder layer looks at: reference box, representative keypoints, Gaussians, and every head's attention.

    tools/visualize_attention.py --weights output/demo/model_final.pth --input datasets/digits/val/000001.png \\
        --output output/attention
    tools/visualize_attention.py --weights sam_detr.pth --compare-weights detr.pth --input street.jpg --output attention
    tools/visualize_attention.py --weights sam_detr.pth --input street.jpg --queries 17 203 --separate --output attention

For every image and chosen query one sheet: a row for each decoder layer with the level it attends to, the image with the
reference box that the layer starts from and all keypoints, then each head's attention (bright) with its keypoint (dot) and,
with SMCA, the line where its Gaussian has fallen to half. Without --queries, the queries of the best detections are drawn.
With --compare-weights, the other model's sheet for the same object stands beside it.
"""

import argparse
from pathlib import Path

import numpy as np
from common import IMAGE_SUFFIXES, SCORE_THRESHOLD, add_model_arguments, load_predictor, run
from detectron2.structures import Instances, pairwise_iou
from PIL import Image

from samdetr.errors import UserError
from samdetr.predictor import Predictor, list_images, read_image
from samdetr.visualization import RecordedLayer, draw_attention, draw_head, draw_pairs, record_attention


def look_at(predictor: Predictor, image: np.ndarray) -> tuple[Instances, list[RecordedLayer]]:
    """Detections in an image, and what the decoder looked at."""
    with record_attention(predictor.model) as layers:
        instances = predictor(image)
    return instances, layers


def choose(instances: Instances, arguments: argparse.Namespace) -> list[tuple[int, int | None]]:
    """Queries to draw, each with the best of its detections."""
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
    """The other model's detection of the same object: the same class, if there is one, and the largest overlap."""
    if detection is None or not len(others):
        return None
    overlap = pairwise_iou(instances.pred_boxes[detection], others.pred_boxes)[0]
    return int((overlap + (others.pred_classes == instances.pred_classes[detection]) * overlap).argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--compare-weights", help="checkpoint of another model of this project to draw beside it")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, or folders of images")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder for the sheets")
    parser.add_argument("--queries", type=int, nargs="+", help="indices of the queries to draw")
    parser.add_argument("--max-queries", type=int, default=4, help="most queries an image, without --queries")
    parser.add_argument("--score-threshold", type=float, default=SCORE_THRESHOLD, help="of the detections to draw")
    parser.add_argument("--separate", action="store_true", help="also one file for each layer and head")
    arguments = parser.parse_args()
    predictor = load_predictor(arguments)
    number = predictor.cfg.MODEL.SAMDETR.NUM_QUERIES
    if any(not 0 <= query < number for query in arguments.queries or ()):
        raise UserError(f"--queries {arguments.queries}: the model's {number} queries are numbered from 0.")
    other = None
    if arguments.compare_weights:
        arguments.config_file = None
        other = load_predictor(arguments, arguments.compare_weights)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    for file in list_images(arguments.input, IMAGE_SUFFIXES):
        image = read_image(file)
        instances, layers = look_at(predictor, image)
        queries = choose(instances, arguments)
        if not queries:
            print(f"{file}: no detection with a score of {arguments.score_threshold} or more; lower --score-threshold.")
        found = look_at(other, image) if other else None
        for query, detection in queries:
            title = describe(query, detection, instances, predictor)
            sheet = draw_attention(image, layers, query, title)
            if found:
                match = same_object(instances, detection, found[0])
                if match is not None:
                    matched = int(found[0].query_indices[match])
                    beside = describe(matched, match, found[0], other)
                    beside = draw_attention(
                        image, found[1], matched, f"{Path(arguments.compare_weights).stem}, {beside}"
                    )
                    sheet = draw_pairs([of_equal_height(sheet, beside)], columns=1)
            path = folder / f"{file.stem}-query{query}.png"
            Image.fromarray(sheet).save(path)
            print(f"{path}: {title}")
            if arguments.separate:
                for i, layer in enumerate(layers):
                    for head in range(layer.query.keypoints.shape[2]):
                        single = draw_head(image, layer, query, head)
                        name = f"{file.stem}-query{query}-layer{i + 1}-head{head + 1}.png"
                        Image.fromarray(single).save(folder / name)


def of_equal_height(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    height = max(len(left), len(right))
    return tuple(np.pad(x, ((0, height - len(x)), (0, 0), (0, 0)), constant_values=255) for x in (left, right))


if __name__ == "__main__":
    run(main)
