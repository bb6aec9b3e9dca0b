"""Whatever is wrong with what a user gives: it works, or it is refused in one line; nothing is wrong in silence."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mutations

seeds = st.integers(0, 2**32)


def bounded(examples):
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=suppressed, database=None)


@bounded(40)
@given(seeds)
def test_the_check_accepts_what_training_and_evaluation_accept(tmp_path, seed):
    mutations.try_dataset(random.Random(seed), tmp_path / "dataset")


@bounded(40)
@given(seeds)
def test_extreme_settings_work_or_are_refused(tmp_path, seed):
    mutations.try_setting(random.Random(seed), tmp_path / "run", mutations.make_entry(tmp_path / "good"))


@bounded(12)
@given(seeds)
def test_metrics_are_drawn_or_refused(tmp_path, seed):
    mutations.try_metrics(random.Random(seed), tmp_path / "metrics.json")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return mutations.make_checkpoint(tmp_path_factory.mktemp("whole"))


@bounded(100)
@given(seeds)
def test_a_damaged_checkpoint_is_refused_or_holds_the_same(checkpoint, tmp_path, seed):
    mutations.try_checkpoint(random.Random(seed), *checkpoint, tmp_path / "damaged.pth")


def test_the_mutations_are_of_both_kinds(checkpoint, tmp_path):
    """Otherwise the properties above would hold of anything."""
    tried = {
        "dataset": lambda rng: mutations.try_dataset(rng, tmp_path / "dataset"),
        "metrics": lambda rng: mutations.try_metrics(rng, tmp_path / "metrics.json"),
        "checkpoint": lambda rng: mutations.try_checkpoint(rng, *checkpoint, tmp_path / "damaged.pth"),
    }
    for kind, attempt in tried.items():
        outcomes = {attempt(random.Random(seed)) for seed in range(12 if kind != "checkpoint" else 60)}
        assert outcomes == {"accepted", "refused"}, kind
