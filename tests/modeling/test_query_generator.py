"""samdetr.modeling.query_generator: learned queries, and denoising queries pair by pair."""

import pytest
import torch

from samdetr.modeling.query_generator import DenoisingQueryGenerator, LearnedQueryGenerator, denoising_attention_mask
from samdetr.modeling.structures import FeatureLevel, ImageTarget


def make_generator(**options):
    defaults = {
        "num_queries": 6,
        "dim": 16,
        "num_classes": 10,
        "num_groups": 5,
        "max_denoising_queries": 500,
        "box_noise": 0.4,
        "label_noise": 0.2,
    }
    return DenoisingQueryGenerator(**{**defaults, **options})


def make_levels(batch_size, dim=16):
    """Encoded images, of which learned queries need only the number."""
    return [
        FeatureLevel(torch.randn(batch_size, 2, 3, dim), torch.zeros(1, 2, 3, dim), torch.full((batch_size, 2), 2.0))
    ]


def make_target(number, num_classes=10):
    boxes = torch.cat([torch.rand(number, 2) * 0.4 + 0.3, torch.rand(number, 2) * 0.2 + 0.1], dim=1)
    return ImageTarget(torch.randint(num_classes, (number,)), boxes)


def test_learned_queries():
    generator = LearnedQueryGenerator(num_queries=7, dim=8)
    queries = generator(make_levels(3), [make_target(2)] * 3)
    assert queries.content.shape == (3, 7, 8) and not queries.content.any()
    assert torch.equal(queries.reference_logits[2], generator.reference_logits)
    assert queries.attention_mask is None and queries.denoising is None


def test_layout_and_targets_of_denoising_queries():
    generator = make_generator(num_groups=3)
    targets = [make_target(2), make_target(0), make_target(4)]
    queries = generator(make_levels(3), targets)
    assert queries.content.shape == (3, 6 + 3 * 4, 16)
    denoising = queries.denoising
    assert generator.num_denoising(targets) == 3 * (2 + 0 + 4) == denoising.valid.sum()
    for image, target in enumerate(targets):
        for group in range(3):
            slots = slice(group * 4, group * 4 + len(target))
            assert torch.equal(denoising.labels[image, slots], target.labels)
            assert torch.equal(denoising.boxes[image, slots], target.boxes)
            assert denoising.valid[image, group * 4 : group * 4 + 4].tolist() == [i < len(target) for i in range(4)]
    # The indicator, and the embedding of the unknown label.
    assert not queries.content[:, :6, -1].any() and (queries.content[:, 6:, -1] == 1).all()
    assert torch.equal(queries.content[1, 3, :-1], generator.label_embedding.weight[-1])


def test_evaluation_has_no_denoising_but_the_same_matching_queries():
    generator = make_generator()
    evaluation = generator(make_levels(2))
    training = generator(make_levels(2), [make_target(2)] * 2)
    assert evaluation.attention_mask is None and evaluation.denoising is None
    assert torch.equal(evaluation.content, training.content[:, :6])
    assert torch.equal(evaluation.reference_logits, training.reference_logits[:, :6])


def test_noise_is_uniform_within_its_bounds():
    generator = make_generator(num_groups=1, max_denoising_queries=20000)
    target = make_target(20000)
    clean, _ = generator.repeat_targets([target])
    labels, boxes = generator.add_noise(clean)
    shift = (boxes - clean.boxes)[0] / torch.cat([target.boxes[:, 2:] / 2, target.boxes[:, 2:]], dim=1)
    assert shift.abs().max() <= 0.4 + 1e-5
    for coordinate in range(4):
        # Uniform in [-0.4, 0.4]: mean 0, standard deviation 0.8 / sqrt(12); 20000 draws.
        assert shift[:, coordinate].mean().abs() < 0.01
        assert abs(shift[:, coordinate].std() - 0.8 / 12**0.5) < 0.005
    # Drawn anew with probability 0.2, which gives the old label again once in ten times.
    changed = (labels[0] != target.labels).float().mean()
    assert abs(changed - 0.2 * 0.9) < 0.015
    drawn = labels[0][labels[0] != target.labels]
    assert torch.bincount(drawn, minlength=10).min() > 0.7 * len(drawn) / 10
    assert torch.equal(clean.labels[0], target.labels)  # what has to be predicted stays the truth


def test_each_group_has_noise_of_its_own():
    queries = make_generator(num_groups=2)(make_levels(1), [make_target(3)])
    first, second = queries.reference_logits[0, 6:9], queries.reference_logits[0, 9:12]
    assert not torch.isclose(first, second).any()


def test_negatives_have_more_noise_and_are_background():
    """Each group holds every box twice; the second time it has one to two times the noise."""
    generator = make_generator(num_groups=2, with_negatives=True, num_queries=3)
    targets = [make_target(4), make_target(2)]
    queries = generator(make_levels(2), targets)
    clean, num_groups = generator.repeat_targets(targets)
    assert num_groups == 2 and queries.content.shape[1] == 3 + 2 * 2 * 4
    assert clean.negative.tolist() == ([False] * 4 + [True] * 4) * 2
    assert generator.num_denoising(targets) == 2 * (4 + 2) == clean.valid[:, ~clean.negative].sum()
    _, boxes = generator.add_noise(clean)
    size = clean.boxes[..., 2:]
    share = ((boxes - clean.boxes) / torch.cat([size / 2, size], dim=-1) / 0.4).abs()[clean.valid]
    negative = clean.negative.expand_as(clean.valid)[clean.valid]
    assert share[~negative].max() <= 1 + 1e-4
    assert share[negative].min() >= 1 - 1e-4 and 1.5 < share[negative].max() <= 2 + 1e-4
    # A denoising query sees the matching queries and its whole group, negatives included.
    sees = queries.attention_mask[0, 0, 3 + 1].tolist()
    assert sees == [True] * 3 + [True] * 8 + [False] * 8


def test_negatives_count_among_the_most_denoising_queries():
    generator = make_generator(num_groups=5, max_denoising_queries=12, with_negatives=True, num_queries=3)
    assert generator(make_levels(1), [make_target(3)]).content.shape[1] == 3 + 2 * 2 * 3  # two groups instead of five


def test_boxes_at_the_edge_stay_in_the_image_and_finite():
    target = ImageTarget(torch.tensor([0, 1]), torch.tensor([[0.0, 1.0, 0.9, 1.0], [0.999, 0.5, 1e-7, 1e-7]]))
    generator = make_generator()
    clean, _ = generator.repeat_targets([target])
    _, boxes = generator.add_noise(clean)
    assert boxes.min() >= 0 and boxes.max() <= 1
    logits = generator(make_levels(1), [target]).reference_logits[:, 6:]
    assert logits.isfinite().all()
    assert logits.sigmoid().min() >= 1e-3 - 1e-6 and logits.sigmoid().max() <= 1 - 1e-3 + 1e-6


def test_attention_mask_pair_by_pair():
    valid = torch.tensor([[True, True, True, True], [True, False, True, False]])
    mask = denoising_attention_mask(num_matching=3, num_groups=2, valid=valid)
    assert mask.shape == (2, 1, 7, 7)
    group = [None, None, None, 0, 0, 1, 1]
    for image in range(2):
        for i in range(7):
            for j in range(7):
                # Everybody sees the matching queries, and real ones of the same group.
                expected = group[j] is None or (group[i] == group[j] and bool(valid[image, j - 3]))
                assert mask[image, 0, i, j] == expected, (image, i, j)


@pytest.mark.parametrize(
    ("counts", "groups", "slots"),
    [([1], 5, 1), ([150, 3], 3, 150), ([400], 1, 400), ([501, 2], 1, 500), ([0, 0], 5, 0)],
)
def test_number_of_queries_is_bounded(counts, groups, slots):
    generator = make_generator()
    targets = [make_target(count) for count in counts]
    denoising, num_groups = generator.repeat_targets(targets)
    assert num_groups == groups
    assert denoising.labels.shape == (len(counts), groups * slots)
    expected = groups * sum(min(count, 500) for count in counts)
    assert generator.num_denoising(targets) == expected == denoising.valid.sum()
    queries = generator(make_levels(len(counts)), targets)
    assert queries.content.shape[1] == 6 + groups * slots


def test_more_boxes_than_queries_are_chosen_at_random_without_repetition():
    generator = make_generator(max_denoising_queries=8)
    target = make_target(20)
    first, _ = generator.repeat_targets([target])
    second, _ = generator.repeat_targets([target])
    assert not torch.equal(first.boxes, second.boxes)
    assert len({tuple(box) for box in first.boxes[0].tolist()}) == 8


def test_without_any_box_the_label_embedding_still_gets_a_gradient():
    generator = make_generator()
    queries = generator(make_levels(2), [make_target(0)] * 2)
    queries.content.sum().backward()
    assert generator.label_embedding.weight.grad is not None
