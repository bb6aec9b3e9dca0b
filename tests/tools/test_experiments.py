"""tools/experiments/: what is run, what is read from the runs, and what is reported."""

import contextlib
import fcntl
import json
import time
from pathlib import Path

import pytest
import scheduler
from experiment import collect, config_of, read_curve, read_experiment
from summary import first_reaching, make_plot, make_table, read_results

from processes import ROOT, Script, run_script
from samdetr.errors import UserError

TINY_PATH = "configs/quick_schedules/sam_detr_digits_instant_test.yaml"


def experiment_file(folder, text=None):
    path = Path(folder) / "experiment.yaml"
    path.write_text(
        text
        or f"""
goals: [slow]
groups:
  - title: "One"
    runs:
      - {{name: slow, config: {TINY_PATH}, seeds: [1, 2]}}
      - {{name: fast, config: {TINY_PATH}, seeds: [1, 2], options: [MODEL.SAMDETR.NUM_QUERIES, 6]}}
  - title: "Two"
    runs:
      - {{name: other, config: {TINY_PATH}, seeds: [1]}}
    also: [slow]
"""
    )
    return path


def result(name, seed, *points):
    return {"name": name, "config": TINY_PATH, "seed": seed, "curve": [list(point) for point in points]}


RESULTS = [
    result("slow", 1, (10, 1.0, 0.0), (20, 2.0, 4.0)),
    result("slow", 2, (10, 1.0, 1.0), (20, 2.0, 6.0)),
    result("fast", 1, (10, 2.0, 5.0), (20, 4.0, 9.0)),
    result("fast", 2, (10, 2.0, 3.0), (20, 4.0, 4.0)),
]


def test_first_reaching():
    curve = RESULTS[2]["curve"]
    assert first_reaching(curve, 5.0) == [10, 2.0, 5.0]
    assert first_reaching(curve, 5.1) == [20, 4.0, 9.0]
    assert first_reaching(curve, 10.0) is None


def test_table(tmp_path):
    """Means and deviations over seeds; the goal is the mean of the baseline's last evaluations. Not all need be timed."""
    lines = make_table(read_experiment(experiment_file(tmp_path)), RESULTS).splitlines()
    rows = {row[0]: row for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert rows["run"] == ["run", "seeds", "steps", "final AP", "reaches slow's 5.0", "s per step"]
    assert rows["slow"] == ["slow", "2", "20", "5.0 ± 1.4", "step 20, 2 s (1 of 2 seeds)", "0.100"]
    assert rows["fast"] == ["fast", "2", "20", "6.5 ± 3.5", "step 10, 2 s (1 of 2 seeds)", "0.200"]
    assert rows["other"][:3] == ["other", "not run", ""]
    (untimed,) = (
        line
        for line in make_table(
            read_experiment(experiment_file(tmp_path)), [*RESULTS, result("other", 1, (10, 0.0, 2.0), (20, 0.0, 7.0))]
        ).splitlines()
        if line.startswith("| other")
    )
    assert [cell.strip() for cell in untimed.split("|")[4:-1]] == ["7.0", "step 20", ""]


def test_plot(tmp_path):
    experiment = read_experiment(experiment_file(tmp_path))
    figure = make_plot(experiment, RESULTS)
    assert len(figure.axes) == 2  # of the second group nothing has been run
    steps, seconds = figure.axes
    slow = next(line for line in seconds.lines if line.get_label().startswith("slow"))
    assert slow.get_xdata().tolist() == [1.0, 2.0] and slow.get_ydata().tolist() == [0.5, 5.0]
    fast = next(line for line in steps.lines if line.get_label().startswith("fast"))
    assert fast.get_label() == "fast (2 seeds)" and fast.get_ydata().tolist() == [4.0, 6.5]
    assert [20] in [list(line.get_xdata()) for line in steps.lines]  # the ring where it reaches slow's 5.0
    assert "final AP of slow: 5.0" in [line.get_label() for line in steps.lines]
    low = make_plot(experiment, [*RESULTS, result("other", 1, (10, 1.0, 2.0))])  # shown beside slow's 5.0
    assert "final AP of slow: 5.0" in [line.get_label() for line in low.axes[2].lines]
    assert len(make_plot(experiment, [*RESULTS, result("other", 1, (10, 1.0, 2.0))]).axes) == 4


def test_runs_that_were_not_timed_are_in_the_legend_beside_the_empty_panel(tmp_path):
    experiment = read_experiment(experiment_file(tmp_path))
    steps, seconds = make_plot(experiment, [result("slow", 1, (10, 0.0, 2.0))]).axes
    assert not seconds.axison and steps.axison
    assert "slow (1 seed)" in [text.get_text() for text in seconds.get_legend().get_texts()]


def test_curves_are_read_from_the_metrics(tmp_path):
    """Steps are counted from one, seconds are by the given step, NaN (nothing detected) is an AP of 0."""
    assert read_curve(tmp_path, 6) == []
    (tmp_path / "metrics.json").write_text('{"iteration": 1, "ti')  # killed while it wrote its first line
    assert read_curve(tmp_path, 6) == []
    entries = [
        {"iteration": 2, "bbox/AP": float("nan")},
        {"iteration": 6, "bbox/AP": 12.5},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert read_curve(tmp_path, 6, 0.1) == [[3, 0.3, 0.0], [6, 0.6, 12.5]]
    assert read_curve(tmp_path, 6) == [[3, 0.0, 0.0], [6, 0.0, 12.5]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: [", "is not an experiment"),
        ("goals: []", "is not an experiment .*groups"),
        (
            "goals: [a]\ngroups: [{title: t, runs: [{name: b, config: c, seeds: [1]}]}]",
            "mentions 'a', .*none of its runs: b",
        ),
        ("goals: []\ngroups: [{title: t, runs: [{name: b, seeds: [1]}]}]", "is not an experiment .*config"),
        (
            "goals: []\ngroups: [{title: t, runs: [{name: b, config: c, seeds: [1]}, {name: b, config: c, seeds: [1]}]}]",
            "several runs named 'b'",
        ),
        ("goals: []\ngroups: [{title: t, runs: [{name: b, config: c, seeds: 3}]}]", "is not an experiment"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_experiment(experiment_file(tmp_path, text))


def test_mistakes_in_a_run_come_to_light_before_anything_is_trained(tmp_path):
    text = experiment_file(tmp_path).read_text().replace("NUM_QUERIES", "NUM_QUERYS")
    experiment = read_experiment(experiment_file(tmp_path, text))
    with pytest.raises(UserError, match=r"NUM_QUERYS.*Did you mean"):
        scheduler.train(experiment, tmp_path, [], jobs=1, threads=1, lock=0)
    text = experiment_file(tmp_path).read_text().replace("[MODEL.SAMDETR.NUM_QUERIES, 6]", "[TEST.EVAL_PERIOD, 0]")
    with pytest.raises(UserError, match=r"fast: TEST\.EVAL_PERIOD is 0, so that there is no curve"):
        scheduler.train(read_experiment(experiment_file(tmp_path, text)), tmp_path, [], jobs=1, threads=1, lock=0)
    text = experiment_file(tmp_path).read_text().replace("[MODEL.SAMDETR.NUM_QUERIES, 6]", "[SOLVER.PATIENCE, 2]")
    with pytest.raises(UserError, match=r"fast: SOLVER\.PATIENCE is 2, but all runs have all of their steps"):
        scheduler.train(read_experiment(experiment_file(tmp_path, text)), tmp_path, [], jobs=1, threads=1, lock=0)
    text = experiment_file(tmp_path).read_text().replace("[MODEL.SAMDETR.NUM_QUERIES, 6]", "[SOLVER.EPOCHS, 2]")
    with pytest.raises(UserError, match=r"fast: SOLVER\.EPOCHS is 2, but runs are compared by steps: set MAX_ITER"):
        scheduler.train(read_experiment(experiment_file(tmp_path, text)), tmp_path, [], jobs=1, threads=1, lock=0)
    assert not list(tmp_path.rglob("metrics.json"))


def test_a_folder_of_another_config_is_refused(tmp_path):
    entry = read_experiment(experiment_file(tmp_path)).runs[0]
    folder = entry.folder(tmp_path, 1)
    scheduler.keep_config(config_of(entry, 1, folder), folder)
    scheduler.keep_config(config_of(entry, 1, folder), folder)
    entry.options = ["SOLVER.BASE_LR", "0.1"]
    scheduler.keep_config(config_of(entry, 1, folder), folder)  # nothing has been trained there yet
    (folder / "stdout.txt").touch()
    scheduler.keep_config(config_of(entry, 1, folder), folder)
    entry.options = ["SOLVER.BASE_LR", "0.2"]
    with pytest.raises(UserError, match=r"holds a run of another config, which differs in SOLVER\.BASE_LR"):
        scheduler.keep_config(config_of(entry, 1, folder), folder)


def test_a_key_that_was_not_there_yet_counts_with_its_default(tmp_path):
    entry = read_experiment(experiment_file(tmp_path)).runs[0]
    folder = entry.folder(tmp_path, 1)
    scheduler.keep_config(config_of(entry, 1, folder), folder)
    (folder / "stdout.txt").touch()
    kept = (folder / "experiment.yaml").read_text()
    assert "  PATIENCE: 0\n" in kept
    (folder / "experiment.yaml").write_text(kept.replace("  PATIENCE: 0\n", ""))
    scheduler.keep_config(config_of(entry, 1, folder), folder)
    (folder / "experiment.yaml").write_text(kept.replace("  PATIENCE: 0\n", ""))
    entry.options += ["SOLVER.PATIENCE", "3"]
    with pytest.raises(UserError, match=r"differs in SOLVER\.PATIENCE"):
        scheduler.keep_config(config_of(entry, 1, folder), folder)


def test_keys_of_samdetr_do_not_matter_to_other_detectors(tmp_path):
    text = experiment_file(tmp_path).read_text()
    for config, kept in (("faster_rcnn.yaml", True), ("sam_detr.yaml", False)):
        entry = read_experiment(experiment_file(tmp_path, text)).runs[0]
        entry.config = f"tools/experiments/configs/{config}"
        folder = entry.folder(tmp_path / config, 1)
        scheduler.keep_config(config_of(entry, 1, folder), folder)
        (folder / "stdout.txt").touch()
        entry.options = [*entry.options, "MODEL.SAMDETR.HIDDEN_DIM", "64"]
        with contextlib.nullcontext() if kept else pytest.raises(UserError, match=r"MODEL\.SAMDETR\.HIDDEN_DIM"):
            scheduler.keep_config(config_of(entry, 1, folder), folder)


def test_results_without_curves_are_refused(tmp_path):
    other = json.dumps([result("other", 1, (1, 1.0, 1.0))])
    for text in ("{", "[{}]", other, '[{"name": "a", "config": "b", "seed": 1, "curve": []}]'):
        (tmp_path / "experiments.json").write_text(text)
        with pytest.raises(UserError, match="has no curves to report"):
            read_results(tmp_path / "experiments.json", {"a"})


TOOL = "tools/experiments/run_experiments.py"


def test_two_at_once_in_one_folder_are_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_script(TOOL, "--experiment", experiment_file(tmp_path), "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "another run_experiments.py, or a run that it has started, works there" in result.stderr


@pytest.mark.slow
@pytest.mark.thorough
def test_an_experiment_that_is_stopped_goes_on(tmp_path):
    text = f"""
goals: []
groups:
  - title: "One"
    runs:
      - {{name: slow, config: {TINY_PATH}, seeds: [1, 2]}}
      - {{name: other, config: {TINY_PATH}, seeds: [1]}}
"""
    arguments = ["--experiment", experiment_file(tmp_path, text), "--output", tmp_path / "out", "--only", "slow"]
    script = Script(TOOL, *arguments)
    checkpoints = tmp_path / "out" / "runs" / "slow" / "seed1"
    deadline = time.time() + 120
    while not list(checkpoints.glob("model_0000002.pth")):
        assert time.time() < deadline and script.process.is_alive()
        time.sleep(0.1)
    script.process.terminate()
    assert "the same command continues from here" in script.wait().stderr

    result = run_script(TOOL, *arguments, "--jobs", 2)
    assert result.returncode == 0, result.stdout + result.stderr
    results = json.loads((tmp_path / "out" / "experiments.json").read_text())
    assert [(r["name"], r["seed"]) for r in results] == [("slow", 1), ("slow", 2)]
    steps = [[point[0] for point in result["curve"]] for result in results]
    assert all(found in ([3, 6], [6]) for found in steps)  # the evaluation at 3 was cut off, or not
    assert "Starting training from iteration 3" in (checkpoints / "stdout.txt").read_text()
    assert (tmp_path / "out" / "experiments.png").stat().st_size > 10_000
    before = (checkpoints / "model_final.pth").stat().st_mtime

    assert "2 of 2 runs are complete" in run_script(TOOL, *arguments).stdout
    assert (checkpoints / "model_final.pth").stat().st_mtime == before
    assert collect(read_experiment(arguments[1]), tmp_path / "out") == results

    timed = run_script(TOOL, *arguments, "--time-steps")
    assert timed.returncode == 0, timed.stderr
    (seconds,) = json.loads((tmp_path / "out" / "step_times.json").read_text()).values()
    assert f"slow: {seconds:.3f} s per step" in timed.stdout and seconds > 0
    for found in collect(read_experiment(arguments[1]), tmp_path / "out"):
        assert found["curve"][-1][1] == pytest.approx(6 * seconds, abs=0.01)


@pytest.mark.thorough
def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path):
    text = f"""
goals: []
groups:
  - title: "One"
    runs:
      - {{name: bad, config: {TINY_PATH}, seeds: [1], options: [SOLVER.BASE_LR, 1000.0, SOLVER.CLIP_GRADIENTS.ENABLED, False]}}
      - {{name: good, config: {TINY_PATH}, seeds: [1]}}
"""
    result = run_script(TOOL, "--experiment", experiment_file(tmp_path, text), "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "bad, seed 1: FAILED" in result.stdout and "good, seed 1: AP" in result.stdout
    assert [r["name"] for r in json.loads((tmp_path / "out" / "experiments.json").read_text())] == ["good"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("digits", "docs"),
        ("published", "tools/experiments/results/published"),
        ("plus_parts", "tools/experiments/results/plus_parts"),
    ],
)
def test_the_documented_table_is_that_of_the_documented_curves(name, folder):
    experiment = read_experiment(ROOT / "tools" / "experiments" / f"{name}.yaml")
    names = {run.name for run in experiment.runs}
    results = ROOT / folder / "experiments.json"
    assert make_table(experiment, read_results(results, names)) in (ROOT / "docs" / "results.md").read_text()


@pytest.mark.parametrize("name", ["digits", "published", "plus_parts"])
def test_every_run_of_the_shipped_experiments_would_start(name):
    for entry in read_experiment(ROOT / "tools" / "experiments" / f"{name}.yaml").runs:
        scheduler.check_run(entry, config_of(entry, 1, Path("output")))
