"""samdetr.data.sampling: batches and randomness depend on the seed and the place alone."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samdetr.data.sampling import SampledDataset, TrainingBatchSampler, seeded
from samdetr.errors import UserError


def batches(sampler, number):
    return list(itertools.islice(iter(sampler), number))


def make_sampler(**options):
    return TrainingBatchSampler(**{"size": 10, "batch_size": 4, "seed": 3, "wide": None, **options})


def test_each_epoch_has_every_image_once():
    indices = [index for batch in batches(make_sampler(), 5) for _, index, _ in batch]
    assert sorted(indices[:10]) == sorted(indices[10:]) == list(range(10))
    assert indices[:10] != indices[10:]
    places = [place for batch in batches(make_sampler(), 5) for place, _, _ in batch]
    assert places == list(range(20))


@pytest.mark.parametrize("wide", [None, [True, False] * 5])
def test_a_stream_can_be_entered_anywhere(wide):
    whole = batches(make_sampler(wide=wide), 9)
    resumed = make_sampler(wide=wide)
    resumed.start = 4
    assert batches(resumed, 5) == whole[4:]


def test_wide_and_high_images_are_not_mixed():
    wide = [index % 3 == 0 for index in range(10)]
    for batch in batches(make_sampler(wide=wide), 12):
        assert len({wide[index] for _, index, _ in batch}) == 1


def test_processes_share_the_batches_of_one():
    whole = batches(make_sampler(wide=[True, False] * 5), 6)
    shares = [batches(make_sampler(wide=[True, False] * 5, rank=rank, world_size=2), 6) for rank in range(2)]
    for batch, first, second in zip(whole, *shares):
        assert len(first) == len(second) == 2
        assert sorted(first + second) == sorted(batch)


def test_batches_that_cannot_be_shared():
    with pytest.raises(ValueError, match=r"batch_size \(4\) must be a positive multiple of world_size \(3\)"):
        make_sampler(world_size=3)


def noisy(record):
    """A mapper that uses every generator."""
    return {**record, "noise": (random.random(), np.random.rand(), torch.rand(1).item())}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_samples_do_not_depend_on_the_workers_or_the_start(num_workers):
    dataset = SampledDataset([{"image_id": i} for i in range(10)], noisy, seed=3, skip_unreadable=False)
    reference = [[dataset[key] for key in batch] for batch in batches(make_sampler(), 5)]
    sampler = make_sampler()
    sampler.start = 2
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=list)
    assert list(itertools.islice(loader, 3)) == reference[2:]
    assert len({sample["noise"] for batch in reference for sample in batch}) == 20


def test_generators_go_on_as_if_nothing_had_been():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = torch.rand(2).tolist(), np.random.rand(2).tolist(), [random.random(), random.random()]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    found = [], [], []
    for _ in range(2):
        found[0].append(torch.rand(1).item())
        found[1].append(np.random.rand())
        found[2].append(random.random())
        with seeded(5, 6):
            noisy({})
    assert [list(x) for x in found] == [list(x) for x in expected]


def failing(record):
    if record["file_name"] in ("3.jpg", "7.jpg"):
        raise UserError(f"{record['file_name']} cannot be used: image file is truncated.")
    return dict(record)


def test_unreadable_images_stop_with_their_name():
    dataset = SampledDataset([{"file_name": f"{i}.jpg"} for i in range(10)], failing, seed=0, skip_unreadable=False)
    message = '3.jpg cannot be used: image file is truncated. Or set DATALOADER.UNREADABLE_IMAGES "skip".'
    assert dataset[0, 3, 0] == {"error": message}


def test_unreadable_images_are_replaced_and_named():
    dataset = SampledDataset([{"file_name": f"{i}.jpg"} for i in range(10)], failing, seed=0, skip_unreadable=True)
    sample = dataset[5, 3, 0]
    assert sample["unreadable_files"][0] == "3.jpg" and sample["file_name"] not in ("3.jpg", "7.jpg")
    assert dataset[5, 3, 0] == sample
    assert "unreadable_files" not in dataset[0, 1, 0]


def test_a_dataset_of_unreadable_images_stops():
    dataset = SampledDataset([{"file_name": "3.jpg"}] * 4, failing, seed=0, skip_unreadable=True)
    assert dataset[0, 0, 0]["error"].startswith("20 images in a row cannot be used, the last is 3.jpg")
