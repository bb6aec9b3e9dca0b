"""Evaluate detections by COCO's metrics, write the results to a file, and score each image by itself."""

import contextlib
import io
import json
import logging
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import COCOeval_opt
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from ..analysis import AP_NAMES, class_ap
from ..checkpoint.checkpoint import write_atomically
from ..config import number_of_classes
from ..data import build_test_loader, load_records, match_classes, read_coco, read_dataset
from ..errors import UserError, one_line_each
from ..solver import autocast

__all__ = ["CheckedEvaluator", "ImageEvaluation", "build_evaluator", "evaluate_images", "f1", "write_results"]

logger = logging.getLogger(__name__)


class CheckedEvaluator(COCOEvaluator):
    """detectron2's evaluator, against what :func:`samdetr.data.read_coco` reads, for annotations with any ids.

    pycocotools would count an annotation whose id is 0 as not found by any detection; here they are numbered from 1. This
    holds as well for a dataset that a function makes, if its metadata name a ``json_file``, which is the ground truth then;
    otherwise the ground truth is what the function returns, without the boxes that training leaves out.

    Attributes:
        coco_eval: pycocotools' result of the last evaluation, with precision by recall; None if there is nothing to evaluate.
        detections: of the last evaluation, in COCO's format.
    """

    coco_eval: COCOeval | None = None
    detections: Sequence[dict] = ()

    def __init__(
        self,
        dataset_name: str,
        tasks: tuple[str, ...] | None = None,
        output_dir: str | None = None,
        max_dets_per_image: int = 100,
        num_classes: int | None = None,
    ):
        """
        Args:
            dataset_name, tasks, output_dir, max_dets_per_image: see :class:`detectron2.evaluation.COCOEvaluator`.
            num_classes: of the model, for a dataset that a function makes and whose classes have no names.

        Raises:
            UserError: the dataset cannot be used.
        """
        metadata = MetadataCatalog.get(dataset_name)
        annotations = read_dataset(dataset_name, skip_missing=True)  # images are another matter
        ids = None
        if annotations is None and metadata.get("json_file"):
            annotations = read_coco(metadata.json_file, metadata.get("image_root", ""))
            annotations.report.refuse_errors(annotations.path, except_for="images missing")
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
        if metadata.get("evaluator_type") not in (None, "coco"):
            logger.warning("%s is evaluated as COCO is, not as %r.", dataset_name, metadata.evaluator_type)
        if annotations is None:
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
            names = metadata.get("thing_classes")
            truth = ground_truth_of_records(dataset_name, load_records(dataset_name), names, ids, num_classes)
        else:
            names, truth = annotations.class_names, annotations.ground_truth()
        # Replaces COCOEvaluator.__init__, which reads the annotation file itself.
        self._logger = logging.getLogger(COCOEvaluator.__module__)
        self._distributed = True
        self._output_dir = output_dir
        self._use_fast_impl = COCOeval_opt is not COCOeval  # COCOeval stands in for it where it was not built
        self._max_dets_per_image = [1, 10, max_dets_per_image]
        self._tasks = tasks
        self._cpu_device = torch.device("cpu")
        self._kpt_oks_sigmas = ()
        self._do_evaluation = annotations is None or annotations.annotated
        self._coco_api = COCO()
        self._coco_api.dataset = truth
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()
        if ids is not None:
            names = metadata.get("thing_classes")
        else:
            ids = {category["id"]: index for index, category in enumerate(truth["categories"])}
        self._metadata = Metadata(name=dataset_name).set(thing_classes=names, thing_dataset_id_to_contiguous_id=ids)
        # pycocotools sorts the classes by their ids, which need not be the order of their names.
        self._names_by_id = names and [names[ids[number]] for number in sorted(ids)]

    def use_classes(self, class_names: Sequence[str]) -> None:
        """Evaluate a model whose classes have these names, by index; the dataset may have them in another order.

        Raises:
            UserError: the dataset has other classes.
        """
        own = one_line_each(self._metadata.get("thing_classes") or ())
        if not own or own == list(class_names):
            return
        order = match_classes(own, class_names)
        ids = self._metadata.get("thing_dataset_id_to_contiguous_id") or {index: index for index in range(len(own))}
        ids = {number: order[index] for number, index in ids.items()}
        self._metadata = Metadata(name=self._metadata.name).set(
            thing_classes=own, thing_dataset_id_to_contiguous_id=ids
        )

    def _eval_predictions(self, predictions, img_ids=None):
        if self._do_evaluation and all(entry["iscrowd"] for entry in self._coco_api.dataset["annotations"]):
            self._do_evaluation = False
            self._logger.warning("%s has no annotated objects: there is no AP.", self._metadata.name)
        super()._eval_predictions(predictions, img_ids=img_ids)  # puts the dataset's category ids into the predictions
        self.detections = [detection for prediction in predictions for detection in prediction["instances"]]

    def ground_truth(self, image_ids: Collection[int | str]) -> dict:
        """Return the ground truth of some images in COCO's format."""
        dataset = self._coco_api.dataset
        return {
            "categories": dataset["categories"],
            "images": [image for image in dataset["images"] if image["id"] in image_ids],
            "annotations": [entry for entry in dataset.get("annotations", []) if entry["image_id"] in image_ids],
        }

    def _derive_coco_results(self, coco_eval, iou_type, class_names=None):
        self.coco_eval = coco_eval
        return super()._derive_coco_results(coco_eval, iou_type, self._names_by_id)


def build_evaluator(
    cfg, dataset_name: str, output_dir: str | None, tasks: tuple[str, ...] | None = None
) -> CheckedEvaluator:
    """Build the evaluator that every evaluation here uses.

    Args:
        cfg: the config. COCO's limit of 100 detections per image rises to ``TEST.DETECTIONS_PER_IMAGE``, if that is more.
        dataset_name: name of a registered dataset.
        output_dir: where to write the detections; None not to write them.
        tasks: such as "bbox"; None for whatever the model predicts.

    Raises:
        UserError: the dataset cannot be used.
    """
    limit, (_, num_classes) = max(100, cfg.TEST.DETECTIONS_PER_IMAGE), number_of_classes(cfg)
    return CheckedEvaluator(dataset_name, tasks, output_dir, limit, num_classes)


def ground_truth_of_records(
    dataset_name: str,
    records: list[dict],
    class_names: Sequence[str] | None,
    ids: dict[int, int] | None,
    num_classes: int | None = None,
) -> dict[str, list[dict]]:
    """Return records in detectron2's standard format as the content of a file in COCO's format; only their boxes.

    Args:
        dataset_name: name of the dataset.
        records: its images, as :func:`samdetr.data.load_records` has checked them.
        class_names: the classes' names, by index; None if they are not known.
        ids: the classes' indices, by the dataset's own ids; None if these are the indices.
        num_classes: of the model, for classes without names.

    Raises:
        UserError: there is an object of none of the classes.
    """
    annotations: list[dict] = []
    for record in records:
        for entry in record.get("annotations", []):
            box = BoxMode.convert(list(entry["bbox"]), entry["bbox_mode"], BoxMode.XYWH_ABS)
            common = {"id": len(annotations) + 1, "image_id": record["image_id"], "category_id": entry["category_id"]}
            annotations.append({**common, "bbox": box, "area": box[2] * box[3], "iscrowd": entry.get("iscrowd", 0)})
    if class_names is None:
        number = num_classes or 1 + max([*(entry["category_id"] for entry in annotations), *(ids or {0: 0}).values()])
        class_names = [str(index) for index in range(number)]
    own_ids = {index: number for number, index in (ids or {i: i for i in range(len(class_names))}).items()}
    for entry in annotations:
        if entry["category_id"] not in own_ids:
            raise UserError(
                f"The dataset {dataset_name!r}, which a function made, has an object of class {entry['category_id']} in image "
                f"{entry['image_id']}, but there are {len(own_ids)} classes: correct it, or name the classes in its metadata's "
                "thing_classes."
            )
        entry["category_id"] = own_ids[entry["category_id"]]
    categories = [{"id": own_ids[index], "name": name} for index, name in enumerate(class_names)]
    keys = ("file_name", "height", "width")
    images = [{"id": record["image_id"], **{key: record[key] for key in keys if key in record}} for record in records]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_results(cfg, results: dict, name: str, weights: str) -> None:
    """Write results, with the weights and datasets that they belong to, to a file in OUTPUT_DIR, on the main process.

    JSON has no NaN: an AP without boxes that it could be of is ``null``. A file of this name with the results of other datasets
    gets their names added to its own.
    """
    if comm.is_main_process():
        path = Path(cfg.OUTPUT_DIR, name)
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # there is none, or it is no such file
            datasets = json.loads(path.read_text())["datasets"]
            if datasets != list(cfg.DATASETS.TEST):
                stem = re.sub(r"[^\w.-]", "_", "_".join([path.stem, *datasets]))
                path.replace(path.with_name(stem + path.suffix))
        content = {"weights": weights, "datasets": list(cfg.DATASETS.TEST), "results": _without_nan(results)}
        with write_atomically(path) as f:
            f.write(json.dumps(content, indent=1, allow_nan=False).encode())


def _without_nan(results):
    if isinstance(results, dict):
        return {key: _without_nan(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results


@dataclass
class ImageEvaluation:
    """COCO's evaluation of a dataset, with the detections and the F1 of each image.

    Attributes:
        records: the dataset's records, in detectron2's standard format.
        detections: by image id, boxes in the image's pixels.
        ground_truth: of the same images, in COCO's format.
        coco_detections: the detections in COCO's format.
        results: detectron2's, in percent: "AP", "AP50", ..., "APl", and "AP-NAME" of every class; NaN where there are no
            such objects, and everywhere if nothing is detected.
        class_ap: (K, 6), see :func:`samdetr.analysis.class_ap`, by category id.
        precision: (IoU thresholds, recall steps), mean over classes; zeros if nothing is detected, or there are no objects.
        quality: F1 of each image id, in [0, 1].
    """

    records: list[dict]
    detections: dict[int, Instances]
    ground_truth: dict
    coco_detections: Sequence[dict]
    results: dict[str, float]
    class_ap: np.ndarray
    precision: np.ndarray
    quality: dict[int, float]


def evaluate_images(
    cfg,
    model: torch.nn.Module,
    dataset_name: str,
    max_images: int | None,
    score_threshold: float,
    class_names: Sequence[str] | None = None,
) -> ImageEvaluation:
    """Evaluate a model as a training run does, and keep the detections and the F1 of each image.

    Args:
        cfg: the model's config.
        model: in evaluation mode.
        dataset_name: name of a registered dataset.
        max_images: evaluate the first images only; None for all.
        score_threshold: detections below it do not count for F1.
        class_names: the model's classes, by index, by which those of the dataset are matched; None if they are not known.

    Raises:
        UserError: the dataset cannot be used, or has other classes.
    """
    records = load_records(dataset_name, class_names)[:max_images]
    wanted = {record["image_id"] for record in records}
    found: dict[int, Instances] = {}
    evaluator = build_evaluator(cfg, dataset_name, output_dir=None, tasks=("bbox",))
    if class_names is not None:
        evaluator.use_classes(class_names)
    evaluator.reset()
    progress = tqdm(total=len(records), unit="image")
    for batch in build_test_loader(cfg, dataset_name):
        if len(found) == len(wanted):
            break
        with torch.no_grad(), autocast(cfg, model.device):
            outputs = model(batch)
        pairs = [(i, o) for i, o in zip(batch, outputs) if i["image_id"] in wanted]
        evaluator.process(*([part[i] for part in pairs] for i in (0, 1)))
        found |= {inputs["image_id"]: output["instances"].to("cpu") for inputs, output in pairs}
        progress.update(len(pairs))
    progress.close()
    results = evaluator.evaluate(img_ids=sorted(wanted)).get("bbox", dict.fromkeys(AP_NAMES, math.nan))
    truth = evaluator.ground_truth(wanted)
    by_class, by_recall = np.full((len(truth["categories"]), len(AP_NAMES)), math.nan), np.zeros((10, 101))
    if evaluator.coco_eval is not None:
        precision = evaluator.coco_eval.eval["precision"]  # (IoU, recall, K, areas, limits); -1: a class without boxes
        by_class = class_ap(precision)
        has_boxes = (precision[..., 0, -1] >= 0).all((0, 1))
        if has_boxes.any():
            by_recall = precision[..., has_boxes, 0, -1].mean(-1)
    quality = {record["image_id"]: f1(record, found[record["image_id"]], score_threshold) for record in records}
    return ImageEvaluation(records, found, truth, evaluator.detections, results, by_class, by_recall, quality)


def f1(record: dict, instances: Instances, score_threshold: float) -> float:
    """Return the F1 of one image at IoU 0.5: each box is found by at most one detection of its class, the best first."""
    truth = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
    confident = instances[instances.scores >= score_threshold]
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
