"""Build data loaders over registered datasets, in an order that can be resumed; what they cannot read ends in a UserError."""

import atexit
import logging
import math
import multiprocessing
import re
import signal
from collections.abc import Iterator
from itertools import chain

import numpy as np
from detectron2.data import DatasetFromList
from detectron2.data.build import (
    filter_images_with_only_crowd_annotations,
    print_instances_class_histogram,
    trivial_batch_collator,
)
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader

from ..config import number_of_classes
from ..errors import UserError
from ..limits import SET_DETECTORS
from .dataset_mapper import DetrDatasetMapper
from .datasets import class_names_of, load_records
from .mixing import Mixing
from .sampling import MappedDataset, SampledDataset, TrainingBatchSampler

__all__ = [
    "CheckedLoader",
    "TrainLoader",
    "build_test_loader",
    "build_train_loader",
    "end_workers",
    "resolve_epochs",
    "warn_about_capacity",
]

logger = logging.getLogger(__name__)


def _leave_signals_to_the_run(worker: int) -> None:
    """Let a worker go on when a signal asks all processes to stop: the run still needs it to finish the step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@atexit.register  # a process that multiprocessing has started does not do what is registered
def end_workers() -> None:
    """End the workers that are left when a process ends; it would wait for ever for them to heed a SIGTERM."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class CheckedLoader(DataLoader):
    """A loader that raises what its workers could not do as a :class:`UserError`, without their tracebacks."""

    def __init__(self, dataset, **options):
        super().__init__(
            dataset, collate_fn=trivial_batch_collator, worker_init_fn=_leave_signals_to_the_run, **options
        )

    def __iter__(self) -> Iterator[list[dict]]:
        batches = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not re.match(r"DataLoader worker \(pid\b", str(error)):  # not an error that was raised in one
                    raise
                raise UserError(
                    "A data-loading worker was killed, as happens when memory runs out: lower DATALOADER.NUM_WORKERS "
                    f"({self.num_workers}), or make room, and resume."
                ) from error
            for inputs in batch:
                if "error" in inputs:
                    raise UserError(inputs["error"])
            yield batch


class TrainLoader(CheckedLoader):
    """An endless loader that yields this process's share of each batch.

    What it yields depends on the seed and on the number of the batch only, so that a run can resume at any step, with any
    number of workers.
    """

    def __init__(self, dataset: SampledDataset, batch_sampler: TrainingBatchSampler, **options):
        super().__init__(dataset, batch_sampler=batch_sampler, **options)

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
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world_size:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH ({cfg.SOLVER.IMS_PER_BATCH}) must be a positive multiple of the number of processes "
            f"({world_size})."
        )
    records = _training_records(cfg)
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [record.get("width", 0) > record.get("height", 0) for record in records]
    dataset = SampledDataset(
        DatasetFromList(records, copy=False),  # serialised, so that workers share the memory
        DetrDatasetMapper(cfg, is_train=True),
        seed=seed,
        skip_unreadable=cfg.DATALOADER.UNREADABLE_IMAGES == "skip",
        **_mixing_and_end(cfg, records),
    )
    sampler = TrainingBatchSampler(
        size=len(records),
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=seed,
        wide=wide,
        rank=comm.get_rank(),
        world_size=world_size,
    )
    pin_memory = cfg.MODEL.DEVICE.startswith("cuda")  # from which copies to the device do not wait
    return TrainLoader(dataset, sampler, num_workers=cfg.DATALOADER.NUM_WORKERS, pin_memory=pin_memory)


def _training_records(cfg, report: bool = True) -> list[dict]:
    """Return the images to train on; log what is to know about them, if ``report``."""
    class_names = class_names_of(cfg.DATASETS.TRAIN[0])
    skip_missing = cfg.DATALOADER.UNREADABLE_IMAGES == "skip"
    datasets = {
        name: load_records(name, class_names, training=True, skip_missing=skip_missing) for name in cfg.DATASETS.TRAIN
    }
    key, number = number_of_classes(cfg)
    for name, found in datasets.items():
        labels = (entry["category_id"] for record in found for entry in record.get("annotations", []))
        if number is not None and (largest := max(labels, default=0)) >= number:
            raise UserError(
                f"{name!r} has objects of class {largest}, but {key} is {number}: raise it, or correct the dataset."
            )
    for name, found in datasets.items() if report else ():
        warn_about_capacity(cfg, name, found, training=True)
    records = list(chain.from_iterable(datasets.values()))
    annotated = all("annotations" in record for record in records)
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS and annotated:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise UserError(f"DATASETS.TRAIN {tuple(cfg.DATASETS.TRAIN)} has no image to train on.")
    if report and class_names is not None and annotated:
        print_instances_class_histogram(records, class_names)
    return records


def resolve_epochs(cfg):
    """Return a config whose lengths in iterations are those of ``cfg.SOLVER.EPOCHS``; ``cfg`` itself if that is 0.

    ``SOLVER.MAX_ITER`` becomes the number of steps that so many passes over ``DATASETS.TRAIN`` take, and ``STEPS``,
    ``WARMUP_ITERS``, ``CHECKPOINT_PERIOD``, ``TEST.EVAL_PERIOD``, ``INPUT.AUGMENTATION_OFF_ITERS`` and the length of the moving
    average, 1 / (1 - ``EMA.DECAY``), keep their shares of it; of a run of few iterations, steps that would fall on its end are
    left out.

    Raises:
        UserError: the datasets cannot be used.
    """
    if not cfg.SOLVER.EPOCHS:
        return cfg
    images = len(_training_records(cfg, report=False))
    iterations = max(1, math.ceil(cfg.SOLVER.EPOCHS * images / cfg.SOLVER.IMS_PER_BATCH))
    share = iterations / cfg.SOLVER.MAX_ITER
    resolved = cfg.clone()
    resolved.defrost()
    resolved.SOLVER.MAX_ITER = iterations
    steps = {max(1, round(step * share)) for step in cfg.SOLVER.STEPS}
    resolved.SOLVER.STEPS = tuple(sorted(step for step in steps if step < iterations))
    for node, key in (
        (resolved.SOLVER, "WARMUP_ITERS"),
        (resolved.SOLVER, "CHECKPOINT_PERIOD"),
        (resolved.TEST, "EVAL_PERIOD"),
        (resolved.INPUT, "AUGMENTATION_OFF_ITERS"),
    ):
        node[key] = max(1, round(node[key] * share)) if node[key] else 0
    resolved.SOLVER.EMA.DECAY = max(0.0, 1 - (1 - cfg.SOLVER.EMA.DECAY) / share)
    logger.info(
        "SOLVER.EPOCHS %d of %d images are %d iterations; STEPS %s, WARMUP_ITERS %d, CHECKPOINT_PERIOD %d, EVAL_PERIOD %d, "
        "EMA.DECAY %.6g.",
        *(cfg.SOLVER.EPOCHS, images, iterations, resolved.SOLVER.STEPS, resolved.SOLVER.WARMUP_ITERS),
        *(resolved.SOLVER.CHECKPOINT_PERIOD, resolved.TEST.EVAL_PERIOD, resolved.SOLVER.EMA.DECAY),
    )
    if cfg.is_frozen():
        resolved.freeze()
    return resolved


def _mixing_and_end(cfg, records: list[dict]) -> dict:
    """Return the arguments of :class:`SampledDataset` for mosaic, mixup, and the iterations at the end without augmentation."""
    arguments = {}
    mixing = Mixing(mosaic_prob=cfg.INPUT.MOSAIC.PROB, mixup_prob=cfg.INPUT.MIXUP.PROB)
    if mixing.most_images > 1:
        arguments["mixing"] = mixing
        logger.info("Training images are mixed: %s.", mixing)
        boxes = sorted(len(record.get("annotations", [])) for record in records)[-mixing.most_images :]
        if cfg.MODEL.META_ARCHITECTURE in SET_DETECTORS and sum(boxes) > cfg.MODEL.SAMDETR.NUM_QUERIES:
            logger.warning(
                "Mixed images have up to %d boxes, more than MODEL.SAMDETR.NUM_QUERIES (%d): those beyond it are not learned "
                "in a step.",
                *(sum(boxes), cfg.MODEL.SAMDETR.NUM_QUERIES),
            )
    if cfg.INPUT.AUGMENTATION_OFF_ITERS:
        arguments["final_from"] = cfg.SOLVER.MAX_ITER - cfg.INPUT.AUGMENTATION_OFF_ITERS
        logger.info("From iteration %d on, images are not mixed, and augmented by:", arguments["final_from"])
        arguments["final_mapper"] = DetrDatasetMapper(cfg, is_train=True, strong=False)
    return arguments


def build_test_loader(cfg, dataset_name: str) -> CheckedLoader:
    """Build a loader over a dataset's images in their order, with ``cfg.TEST.IMS_PER_BATCH`` images per batch.

    Raises:
        UserError: the dataset cannot be used.
    """
    records = load_records(dataset_name)
    if not records:
        raise UserError(f"DATASETS.TEST names {dataset_name!r}, which has no images.")
    return CheckedLoader(
        MappedDataset(DatasetFromList(records, copy=False), DetrDatasetMapper(cfg, is_train=False)),
        batch_sampler=BatchSampler(InferenceSampler(len(records)), cfg.TEST.IMS_PER_BATCH, drop_last=False),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def warn_about_capacity(cfg, name: str, records: list[dict], *, training: bool) -> None:
    """Warn of images whose objects cannot all be learned, or all be found.

    Args:
        cfg: the config.
        name: of the dataset.
        records: its images, in detectron2's standard format.
        training: whether they are trained on; otherwise they are evaluated on.
    """
    flags = [[annotation.get("iscrowd", 0) for annotation in record.get("annotations", [])] for record in records]
    boxes = np.array([crowd.count(0) for crowd in flags])
    limits = []
    if cfg.MODEL.META_ARCHITECTURE in SET_DETECTORS:
        effect = "are not learned in a step" if training else "cannot be found"
        limits.append(("MODEL.SAMDETR.NUM_QUERIES", cfg.MODEL.SAMDETR.NUM_QUERIES, effect))
    if not training:
        limits.append(("TEST.DETECTIONS_PER_IMAGE", cfg.TEST.DETECTIONS_PER_IMAGE, "cannot be found"))
        if not boxes.any():
            logger.warning("%s has no annotated objects: there will be no AP.", name)
    for key, limit, effect in limits:
        over = np.flatnonzero(boxes > limit)
        if len(over):
            logger.warning(
                "%s: %d images have more boxes than %s (%d), up to %d in %s: those beyond it %s. Raise it.",
                *(name, len(over), key, limit, boxes.max(), _name_of(records[boxes.argmax()]), effect),
            )
    only_crowd = [record for record, crowd, number in zip(records, flags, boxes) if crowd and not number]
    if only_crowd and training:
        logger.warning(
            "%s: %d images have only crowd regions, the first is %s: they count as images without objects.",
            *(name, len(only_crowd), _name_of(only_crowd[0])),
        )


def _name_of(record: dict) -> str:
    return str(record.get("file_name", record.get("image_id")))
