"""samdetr.engine.output: one run per folder, and every iteration once in its metrics."""

import json
import multiprocessing

import pytest

from samdetr.engine.output import keep_metrics_before, lock_folder, merge_metrics, set_metrics_aside
from samdetr.errors import UserError


def wait(done):
    done.wait(60)


def hold(folder, ready, done):
    """Hold the lock, while a process like a data-loading worker runs, which lives a little longer."""
    with lock_folder(folder):
        worker = multiprocessing.get_context("fork").Process(target=wait, args=(done,))
        worker.start()
        ready.set()
        worker.join()


def test_a_folder_belongs_to_one_run(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), ready, done))
    process.start()
    assert ready.wait(60)
    message = rf"another run is training there \(process {process.pid} on .*name another"
    with pytest.raises(UserError, match=message), lock_folder(str(tmp_path / "run")):
        pass
    process.kill()
    process.join()
    with lock_folder(str(tmp_path / "run")):  # though the worker still lives
        pass
    done.set()


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = r"OUTPUT_DIR .*file.* cannot be written to \(.*: name another folder"
        with pytest.raises(UserError, match=message), lock_folder(str(folder)):
            pass


def test_a_resumed_run_keeps_the_lines_before_it(tmp_path):
    lines = [
        '{"iteration": 1, "lr": 1}',
        '{"iteration": 1, "bbox/AP": 2}',
        "no json",
        '{"iteration": 5, "total_loss": 1}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join([*lines, '{"iteration": 2, "l']))
    kept = keep_metrics_before(str(tmp_path), 5)
    assert kept == {1: {"iteration": 1, "lr": 1, "bbox/AP": 2}}
    assert [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()] == list(kept.values())


@pytest.mark.parametrize("complete", [False, True])
def test_the_final_evaluation_stays(tmp_path, complete):
    """As one during training, if the run goes on."""
    (tmp_path / "metrics.json").write_text('{"iteration": 4, "lr": 1}\n{"iteration": 5, "bbox/AP": 3}\n')
    kept = keep_metrics_before(str(tmp_path), 5, complete=complete)
    if complete:
        assert kept == {4: {"iteration": 4, "lr": 1}, 5: {"iteration": 5, "bbox/AP": 3}}
    else:
        assert kept == {4: {"iteration": 4, "lr": 1, "bbox/AP": 3}}


def test_lines_of_one_iteration_are_merged(tmp_path):
    lines = ['{"iteration": 4, "lr": 1}', '{"iteration": true}', '{"iteration": -1}', '{"iteration": 4, "bbox/AP": 3}']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    merge_metrics(str(tmp_path), {"iteration": 3, "lr": 2})
    found = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert found == [{"iteration": 3, "lr": 2}, {"iteration": 4, "lr": 1, "bbox/AP": 3}]


def test_a_new_run_leaves_an_earlier_ones_metrics_under_another_name(tmp_path):
    names = ["metrics.json", "tracking.json", "events.out.tfevents.17.host.1"]
    (tmp_path / "log.txt").touch()
    for number in (1, 2):
        for name in names:
            (tmp_path / name).write_text(f"run {number}")
        set_metrics_aside(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["earlier_1", "earlier_2", "log.txt"]
    for number in (1, 2):
        found = {path.name: path.read_text() for path in (tmp_path / f"earlier_{number}").iterdir()}
        assert found == dict.fromkeys(names, f"run {number}")
    set_metrics_aside(str(tmp_path / "none"))
