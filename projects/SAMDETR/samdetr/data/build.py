"""Data loaders over detectron2's datasets: cleaned annotations, DETR's augmentation, an order that can be resumed."""

import copy
import logging
from collections import Counter

import numpy as np
from detectron2.data import DatasetFromList, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch.utils.data import DataLoader

from ..errors import UserError
from .dataset_mapper import DetrDatasetMapper
from .sampling import SampledDataset, TrainingBatchSampler

__all__ = ["build_test_loader", "build_train_loader", "clean_annotations"]

logger = logging.getLogger(__name__)


def build_train_loader(cfg) -> DataLoader:
    """An endless loader over ``cfg.DATASETS.TRAIN`` that yields this process's share of each batch.

    Its ``batch_sampler`` is a :class:`TrainingBatchSampler` and its ``dataset`` a :class:`SampledDataset`; what they yield
    depends on their seed and the batch's number alone (``cfg.SEED``, or a random seed if that is negative).
    """
    names, filter_empty = cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    try:
        records = clean_annotations(get_detection_dataset_dicts(names, filter_empty=filter_empty))
    except AssertionError as error:  # detectron2's, for datasets without images
        raise UserError(f"DATASETS.TRAIN {tuple(names)} cannot be trained on: {error}") from error
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record.get("width", 0) > record.get("height", 0) for record in records]
    dataset = SampledDataset(
        DatasetFromList(records, copy=False),  # serialised, so that workers share it
        DetrDatasetMapper(cfg, is_train=True),
        seed=seed,
        skip_unreadable=cfg.DATALOADER.UNREADABLE_IMAGES == "skip",
    )
    sampler = TrainingBatchSampler(
        size=len(records),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=seed,
        wide=wide,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )


def build_test_loader(cfg, dataset_name: str):
    """detectron2's test loader, ``cfg.TEST.IMS_PER_BATCH`` images a batch."""
    mapper = DetrDatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper, batch_size=cfg.TEST.IMS_PER_BATCH)


def clean_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Drop boxes that nothing can be learned from, clip those that reach over the image, and log how many.

    Args:
        dataset_dicts: detectron2's standard dataset dicts; not changed. Without ``height`` and ``width``, boxes that reach
            over the right or lower edge are left to the dataset mapper.

    Returns:
        The same images in the same order, also those left without boxes; boxes are clipped to the image.
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
            return annotation
        counts[kind] += 1
        examples.setdefault(kind, str(record.get("file_name", record.get("image_id"))))
        if kind.startswith("dropped"):
            return None
        return {**annotation, "bbox": clipped, "bbox_mode": BoxMode.XYXY_ABS}

    result = []
    for record in dataset_dicts:
        record = copy.copy(record)
        if "annotations" in record:
            annotations = [cleaned(annotation, record) for annotation in record["annotations"]]
            record["annotations"] = [annotation for annotation in annotations if annotation is not None]
        result.append(record)
    for kind, count in sorted(counts.items()):
        logger.warning("Boxes %s: %d, the first in %s.", kind, count, examples[kind])
    return result
