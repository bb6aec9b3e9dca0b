"""Build data loaders over detectron2's datasets, with cleaned annotations and an order that can be resumed."""

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

__all__ = ["TrainLoader", "build_test_loader", "build_train_loader", "clean_annotations"]

logger = logging.getLogger(__name__)


class TrainLoader(DataLoader):
    """An endless loader that yields this process's share of each batch.

    What it yields depends on the seed and on the number of the batch only, so that a run can resume at any step, with any
    number of workers.
    """

    def __init__(self, dataset: SampledDataset, batch_sampler: TrainingBatchSampler, *, num_workers: int):
        super().__init__(
            dataset, batch_sampler=batch_sampler, num_workers=num_workers, collate_fn=trivial_batch_collator
        )

    @property
    def seed(self) -> int:
        """The seed of order and augmentation; may be set before iteration starts."""
        return self.batch_sampler.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self.batch_sampler.seed = self.dataset.seed = seed

    @property
    def start(self) -> int:
        """The number of batches to leave out at the beginning; may be set before iteration starts."""
        return self.batch_sampler.start

    @start.setter
    def start(self, start: int) -> None:
        self.batch_sampler.start = start

    def epoch(self, batches: int) -> float:
        """Return the number of epochs in ``batches`` batches (of all processes together)."""
        return batches * self.batch_sampler.batch_size / self.batch_sampler.size


def build_train_loader(cfg) -> TrainLoader:
    """Build the loader over ``cfg.DATASETS.TRAIN``; its seed is ``cfg.SEED``, or a random one if that is negative.

    Raises:
        UserError: the datasets have no image, or the batch cannot be shared evenly among the processes.
    """
    names, filter_empty = cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a positive multiple of the number of processes "
            f"({world_size})."
        )
    try:
        records = clean_annotations(get_detection_dataset_dicts(names, filter_empty=filter_empty))
    except AssertionError as error:  # detectron2's, for datasets without images
        raise UserError(f"DATASETS.TRAIN {tuple(names)} cannot be trained on: {error}") from error
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record.get("width", 0) > record.get("height", 0) for record in records]
    dataset = SampledDataset(
        DatasetFromList(records, copy=False),  # serialised, so that workers share the memory
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
        world_size=world_size,
    )
    return TrainLoader(dataset, sampler, num_workers=cfg.DATALOADER.NUM_WORKERS)


def build_test_loader(cfg, dataset_name: str):
    """Build detectron2's test loader, with ``cfg.TEST.IMS_PER_BATCH`` images per batch."""
    mapper = DetrDatasetMapper(cfg, is_train=False)
    return build_detection_test_loader(cfg, dataset_name, mapper=mapper, batch_size=cfg.TEST.IMS_PER_BATCH)


def clean_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Drop boxes that nothing can be learned from, clip those that reach over the image's edge, and log how many.

    Args:
        dataset_dicts: detectron2's standard dataset dicts, which stay unchanged. Without ``height`` and ``width``, boxes
            that reach over the right or lower edge are left to the dataset mapper.

    Returns:
        The same images in the same order, including those left without boxes.
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
