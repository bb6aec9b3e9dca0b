"""Load registered datasets, with their classes in the model's order.

Datasets in COCO's, Pascal VOC's and YOLO's format are read by this project's readers, also those in COCO's format that were
registered by detectron2.
"""

import copy
import logging
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import UserError, one_line_each
from .coco_format import CocoAnnotations, read_coco
from .registration import AnnotationSource

__all__ = ["class_names_of", "classes_by_index", "clean_annotations", "load_records", "match_classes", "read_dataset"]

logger = logging.getLogger(__name__)


def read_dataset(name: str, *, training: bool = False, skip_missing: bool = False) -> CocoAnnotations | None:
    """Read a registered dataset of annotation files; return None for one that a function makes. Changes nothing.

    Args:
        name: of the dataset.
        training: whether it is to be trained on, for which it needs boxes.
        skip_missing: whether images may be missing.

    Raises:
        UserError: the file cannot be used; see :func:`samdetr.data.coco_format.read_coco`.
    """
    file, metadata = DatasetCatalog[name], MetadataCatalog.get(name)
    if getattr(file, "__module__", "") == "detectron2.data.datasets.coco" and metadata.get("evaluator_type") == "coco":
        annotations = read_coco(metadata.json_file, metadata.image_root)  # registered by register_coco_instances
    elif isinstance(file, AnnotationSource):
        annotations = file.read()
    else:
        return None
    annotations.report.refuse_errors(annotations.path, except_for="images missing" if skip_missing else None)
    if training and annotations.crowd.all():
        what = "only crowd regions" if len(annotations.crowd) else "no boxes"
        raise UserError(
            f"{annotations.path} has {what}, so that there is nothing to learn from: annotate some objects."
        )
    named = metadata.get("thing_classes")
    if named is not None and one_line_each(named) != annotations.class_names:
        raise UserError(
            f"{name!r} was registered with the classes {_some(named)}, but {annotations.path} has "
            f"{_some(annotations.class_names)}: register it with those."
        )
    return annotations


def class_names_of(name: str) -> list[str] | None:
    """Return the names of a registered dataset's classes, by index; None if they are not known before it is loaded."""
    names = MetadataCatalog.get(name).get("thing_classes")
    if names is None:
        annotations = read_dataset(name, skip_missing=True)
        names = annotations and annotations.class_names
    return None if names is None else one_line_each(names)


def classes_by_index(datasets: Sequence[str], number: int | None) -> tuple[list[str] | None, list[int] | None]:
    """Return the classes of a model that does not say which it has: names and category ids of the first dataset that is
    registered, loaded or not, with as many classes; (None, None) if there is none.

    Args:
        datasets: names; first those that the model was trained on, whose order its classes have.
        number: of the model's classes; None if it is not known.
    """
    for name in datasets:
        metadata = MetadataCatalog.get(name) if name in DatasetCatalog.list() else None
        names = metadata and metadata.get("thing_classes")
        if names is not None and number in (None, len(names)):
            ids = metadata.get("thing_dataset_id_to_contiguous_id")
            return one_line_each(names), sorted(ids, key=ids.get) if ids else None
    return None, None


def match_classes(own: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Match classes by name: return the index in ``wanted`` of each class in ``own``.

    Raises:
        UserError: they are not the same names.
    """
    if sorted(own) != sorted(wanted):
        extra, missing = ([name for name in a if name not in b] for a, b in ((own, wanted), (wanted, own)))
        raise UserError(
            f"of its {len(own)} classes, it alone has {_some(extra) if extra else 'none'}, and lacks "
            f"{_some(missing) if missing else 'none'}. Classes are matched by name: give the same ones the same names."
        )
    return [list(wanted).index(name) for name in own]


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def load_records(
    name: str, class_names: Sequence[str] | None = None, *, training: bool = False, skip_missing: bool = False
) -> list[dict]:
    """Load a registered dataset in detectron2's standard format, without boxes that nothing can be learned from.

    Args:
        name: of the dataset.
        class_names: the model's classes, by index; None for the dataset's own order.
        training, skip_missing: see :func:`read_dataset`.

    Raises:
        UserError: the dataset cannot be used, or has other classes than the model.
    """
    annotations = read_dataset(name, training=training, skip_missing=skip_missing)
    metadata = MetadataCatalog.get(name)
    if annotations is None:
        records = DatasetCatalog.get(name)
        check_records(records, name, training=training)
        records = clean_annotations(records)
        for record in records:
            if isinstance(record["image_id"], np.integer):
                record["image_id"] = int(record["image_id"])  # for JSON
    else:
        annotations.report.log(annotations.path)
        records = annotations.records()
        ids = {number: index for index, number in enumerate(annotations.category_ids)}
        for key, value in (("thing_classes", annotations.class_names), ("thing_dataset_id_to_contiguous_id", ids)):
            if metadata.get(key) is None:  # registered by detectron2, which fills it in when a dataset is loaded
                metadata.set(**{key: value})
    own = one_line_each(metadata.get("thing_classes") or ())
    if class_names is not None and own and own != list(class_names):
        try:
            order = match_classes(own, class_names)
        except UserError as error:
            raise UserError(f"The dataset {name!r} does not fit: {error}") from error
        logger.info("The classes of %s are in another order than the model's, and are matched by name.", name)
        for record in records:
            found = record.get("annotations", [])
            record["annotations"] = [{**entry, "category_id": order[entry["category_id"]]} for entry in found]
    return records


def check_records(dataset_dicts: list[dict], name: str, *, training: bool) -> None:
    """Check that a dataset that a function made is in detectron2's standard format, as far as detection needs it.

    To be trained on, an image may be there several times.

    Raises:
        UserError: it is not; names the dataset, the record and the key.
    """

    def refuse(what: str) -> None:
        raise UserError(f"The dataset {name!r}, which a function made, cannot be used: {what}.")

    if not isinstance(dataset_dicts, list) or not dataset_dicts:
        refuse("it must be a list of at least one record")
    first_with: dict[object, str] = {}
    metadata = MetadataCatalog.get(name)
    names, ids = metadata.get("thing_classes"), metadata.get("thing_dataset_id_to_contiguous_id")
    odd = [key for key in ids or () if type(key) is not int]
    if odd:
        refuse(
            f"its metadata's thing_dataset_id_to_contiguous_id has the key {odd[0]!r} of the type {type(odd[0]).__name__}: use "
            "Python's int"
        )
    if not training and names is not None and ids and sorted(ids.values()) != list(range(len(names))):
        refuse(
            f"its metadata's thing_dataset_id_to_contiguous_id must name each of its {len(names)} classes' indices once"
        )
    for number, record in enumerate(dataset_dicts):
        where = f"record {number}"
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str | os.PathLike):
            refuse(f"{where} is not a dict with a 'file_name'")
        if not isinstance(record.get("image_id"), int | str | np.integer):
            refuse(f"{where} ({record['file_name']}) has no 'image_id', a number or text of its own")
        if isinstance(record["image_id"], str) != isinstance(dataset_dicts[0]["image_id"], str):
            refuse(
                f"'image_id' is a text in some records and a number in others, such as {where}: make all of them alike"
            )
        other = first_with.setdefault(record["image_id"], where)
        if other != where and not training:
            refuse(
                f"{where} ({record['file_name']}) has the 'image_id' {record['image_id']!r} of {other}: give each its own"
            )
        found = record.get("annotations", [])
        if not isinstance(found, list | tuple) or not all(isinstance(entry, dict) for entry in found):
            refuse(f"'annotations' of {where} ({record['file_name']}) is not a list of dicts")
        for entry in found:
            if not _is_box(entry.get("bbox")):
                refuse(f"a 'bbox' of {where} ({record['file_name']}) is {entry.get('bbox')!r}, not four numbers")
            if entry.get("bbox_mode") not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
                refuse(
                    f"a 'bbox_mode' of {where} ({record['file_name']}) is {entry.get('bbox_mode')!r}, neither "
                    "BoxMode.XYXY_ABS nor BoxMode.XYWH_ABS"
                )
            category = entry.get("category_id")
            if isinstance(category, bool) or not isinstance(category, int | np.integer) or category < 0:
                refuse(f"a 'category_id' of {where} ({record['file_name']}) is {category!r}, not a class's index")
            if names is not None and category >= len(names):
                refuse(
                    f"{where} ({record['file_name']}) has an object of class {category}, but there are {len(names)} classes, "
                    "counted from 0: correct it, or the metadata's thing_classes"
                )


def _is_box(box) -> bool:
    """Return whether a box is four numbers, finite or not."""
    return np.shape(box) == (4,) and all(isinstance(number, int | float | np.number) for number in box)


def clean_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Drop boxes that nothing can be learned from, clip those that reach over the image's edge, and log how many.

    Args:
        dataset_dicts: detectron2's standard dataset dicts, which stay unchanged. Without ``height`` and ``width``, boxes
            that reach over the right or lower edge are left to the dataset mapper.

    Returns:
        The same images in the same order, including those left without boxes. Boxes are floats, of which resizing keeps the
        fractions.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}

    def cleaned(annotation: dict, record: dict) -> dict | None:
        corners = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
        x0, y0, x1, y1 = corners
        size = [record.get("width", np.inf), record.get("height", np.inf)]
        clipped = np.clip(corners, 0, size * 2).tolist()
        if not np.isfinite(corners).all():
            kind = "dropped: not finite"
        elif x1 <= x0 or y1 <= y0:
            kind = "dropped: width or height not positive"
        elif clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
            kind = "dropped: outside the image"
        elif max(abs(a - b) for a, b in zip(clipped, corners)) > 1:
            kind = "clipped: reaching over the image's edge by more than a pixel"
        else:
            return {**annotation, "bbox": [float(value) for value in annotation["bbox"]]}
        counts[kind] += 1
        examples.setdefault(kind, str(record.get("file_name", record.get("image_id"))))
        if kind.startswith("dropped"):
            return None
        return {**annotation, "bbox": clipped, "bbox_mode": BoxMode.XYXY_ABS}

    result = []
    for record in dataset_dicts:
        record = copy.copy(record)
        annotations = [cleaned(annotation, record) for annotation in record.get("annotations", [])]
        record["annotations"] = [annotation for annotation in annotations if annotation is not None]
        result.append(record)
    for kind, count in sorted(counts.items()):
        logger.warning("Boxes %s: %d, the first in %s.", kind, count, examples[kind])
    return result
