"""Order and randomness of the training data, both determined by the seed and the place in the run.

detectron2's samplers and workers carry state that a checkpoint does not hold: the position in the stream, the images that
wait in an aspect ratio's bucket, the workers' random generators. Here a batch is computed from the seed and its number, and
a sample's augmentation from the seed and the sample's place in the stream. So a run can resume at any step, with any number
of workers, and several processes share the batches that one process would have.
"""

import contextlib
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..errors import UserError

__all__ = ["MappedDataset", "SampledDataset", "TrainingBatchSampler", "seeded"]

logger = logging.getLogger(__name__)

_ATTEMPTS = 20  # how many images to try in place of one that cannot be read


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch (CPU) with non-negative numbers, and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.random.default_generator.manual_seed(for_torch)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class TrainingBatchSampler(Sampler):
    """Yield endless shuffled batches of (place in the stream, index of the image, number of the batch).

    Every process forms the batches of all processes together, and takes its share of each.

    Attributes:
        seed: of the shuffling; may be set before iteration starts.
        start: number of batches to leave out at the beginning; may be set before iteration starts.
    """

    def __init__(
        self, *, size: int, batch_size: int, seed: int, wide: list[bool] | None, rank: int = 0, world_size: int = 1
    ):
        """
        Args:
            size: number of images.
            batch_size: images per batch, of all processes together.
            seed: of the shuffling.
            wide: for each image whether it is wider than high, so that like shapes share batches; None for no grouping.
            rank, world_size: number of this process, and how many there are.

        Raises:
            ValueError: the batch cannot be shared evenly.
        """
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size ({batch_size}) must be a positive multiple of world_size ({world_size}).")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start = 0
        self.wide = wide
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for number, batch in itertools.islice(enumerate(self._batches()), self.start, None):
            yield [(place, index, number) for place, index in batch[self.rank :: self.world_size]]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        buckets: tuple[list, list] = ([], [])
        for place, index in enumerate(self._stream()):
            bucket = buckets[self.wide[index] if self.wide is not None else 0]
            bucket.append((place, index))
            if len(bucket) == self.batch_size:
                yield bucket.copy()
                bucket.clear()

    def _stream(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.size, generator=generator).tolist()


class MappedDataset(Dataset):
    """Map records; what the user can mend becomes ``{"error": message}``, so that it passes from a worker as it is."""

    def __init__(self, records, mapper: Callable[[dict], dict]):
        """
        Args:
            records: detectron2's dataset dicts, by index.
            mapper: turns one of them into the model's input, or raises a :class:`UserError`.
        """
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        try:
            return self.mapper(self.records[index])
        except UserError as error:
            return {"error": str(error)}


class SampledDataset(MappedDataset):
    """Map what the sampler yields, each sample with random numbers of its own.

    Attributes:
        seed: of the augmentation; may be set before iteration starts.
    """

    def __init__(
        self,
        records,
        mapper: Callable[[dict], dict],
        *,
        seed: int,
        skip_unreadable: bool,
        mixing: Callable[[dict, Callable[[], dict]], dict] | None = None,
        final_mapper: Callable[[dict], dict] | None = None,
        final_from: float = math.inf,
    ):
        """
        Args:
            records, mapper: see :class:`MappedDataset`.
            seed: of the augmentation.
            skip_unreadable: whether to use another image in place of one that cannot be read. The mapped dict then names
                those left out under ``unreadable_files``.
            mixing: makes a sample of one and of others, which its second argument draws (:mod:`samdetr.data.mixing`).
            final_mapper: maps in place of ``mapper``, and without ``mixing``, from the batch of number ``final_from`` on.
        """
        super().__init__(records, mapper)
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.mixing = mixing
        self.final_mapper = final_mapper
        self.final_from = final_from

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        place, index, batch = key
        unreadable: list[str] = []
        final = self.final_mapper is not None and batch >= self.final_from
        mapper = self.final_mapper if final else self.mapper

        def mapped(index: int) -> dict:
            for _ in range(_ATTEMPTS):
                try:
                    return mapper(self.records[index])
                except UserError as error:
                    if not self.skip_unreadable:
                        raise UserError(f'{error} Or set DATALOADER.UNREADABLE_IMAGES "skip".') from error
                record = self.records[index]
                unreadable.append(str(record.get("file_name", record.get("image_id"))))
                index = random.randrange(len(self))
            raise UserError(f"{_ATTEMPTS} images in a row cannot be used, the last is {unreadable[-1]}.")

        with seeded(self.seed, place):
            try:
                sample = mapped(index)
                if self.mixing is not None and not final:
                    sample = self.mixing(sample, lambda: mapped(random.randrange(len(self))))
            except UserError as error:
                return {"error": str(error)}
        return {**sample, "unreadable_files": unreadable} if unreadable else sample
