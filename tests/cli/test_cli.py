"""The command samdetr: what each subcommand offers, and that it does what its script does."""

import errno
import json
import os
import shlex
import sys

import pytest

from processes import ROOT, as_torchrun, run_script
from samdetr.cli import COMMANDS, make_parser
from samdetr.cli.common import run

DOORS = {
    "train": "train_net.py",
    "predict": "tools/predict.py",
    "check": "tools/check_dataset.py",
    "report": "tools/report.py",
    "attention": "tools/visualize_attention.py",
    "export": "tools/export_model.py",
    "benchmark": "tools/measure/benchmark.py",
}


MAIN = "projects/SAMDETR/samdetr/__main__.py"


def samdetr(*arguments):
    return run_script(MAIN, *arguments)


@pytest.fixture
def command(capsys):
    """Run the command in this process; returns its exit status (or message), and what it printed."""

    def run(*arguments):
        from samdetr.cli import main

        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return ended.value.code, printed.out + printed.err

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_of_itself(name, command):
    status, printed = command(name, "--help")
    assert status == 0
    assert f"\n    samdetr {name} " in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_are_understood(name):
    """Each line that begins with the command, with the options it has."""
    parser = make_parser()
    text = __import__(f"samdetr.cli.{name.replace('-', '_')}", fromlist=["__doc__"]).__doc__.replace("\\\n", "")
    examples = [
        shlex.split(line, comments=True) for line in text.splitlines() if line.startswith(f"    samdetr {name} ")
    ]
    assert examples
    for example in examples:
        assert parser.parse_args(example[1:]).main


def test_every_script_is_a_door_to_its_command():
    assert set(DOORS) == set(COMMANDS) - {"evaluate", "demo-app"}  # evaluate is train with --eval-only
    for name, script in DOORS.items():
        assert f'run_command("{name}")' in (ROOT / script).read_text()


def test_a_script_has_the_options_and_the_errors_of_its_command(tool, command, tmp_path):
    arguments = [tmp_path / "missing.json", tmp_path]
    assert tool("check_dataset", *arguments) == command("check", *arguments)
    for name in ("check_dataset", "check"):
        status, printed = (tool if name == "check_dataset" else command)(name, "--help")
        assert status == 0 and "--train-only" in printed


def test_without_a_config_training_says_what_to_name(command):
    status, _ = command("train", "SOLVER.MAX_ITER", "3")
    assert status == "error: --config-file: name a config, or in --weights a checkpoint that carries one."
    status, _ = command("evaluate", "--weights", ROOT / "setup.py")
    assert "--weights" in status and "setup.py" in status


def test_the_shells_completion_is_printed(command):
    pytest.importorskip("shtab")
    status, printed = command("--print-completion", "bash")
    assert status == 0 and "--score-threshold" in printed


def test_without_shtab_its_package_is_named(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, printed = command("--print-completion", "bash")
    assert status == 1 and "pip install shtab" in printed


@pytest.mark.slow
def test_a_checkpoint_alone_is_evaluated(trained_run, tmp_path):
    folder, _ = trained_run
    result = samdetr("evaluate", "--weights", folder / "model_final.pth", "OUTPUT_DIR", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    written = [folder / "evaluation.json", tmp_path / "evaluation_model_final.json"]
    results = [json.loads(path.read_text())["results"]["bbox"] for path in written]
    assert results[0] == pytest.approx(results[1], abs=0, nan_ok=True)


def test_a_full_disk_is_said_with_its_remedy():
    def fill_the_disk():
        raise OSError(errno.ENOSPC, "No space left on device", "drawings/1.jpg")

    with pytest.raises(
        SystemExit, match=r"^error: .*No space left on device: 'drawings/1\.jpg': make room, or write to"
    ):
        run(fill_the_disk)


@pytest.mark.slow
def test_processes_share_what_is_predicted(run_folder, pictures, tmp_path):
    """Two processes give one result, that of one process, and an image that cannot be read does not stop them."""
    (pictures / "three.png").write_bytes(b"no image")
    arguments = ["--weights", run_folder / "model_final.pth", "--input", pictures, "--score-threshold", 0.05]
    alone = samdetr("predict", *arguments, "--output", tmp_path / "alone")
    processes = as_torchrun(MAIN, "predict", *arguments, "--output", tmp_path / "together")
    first, second = (process.wait() for process in processes)
    assert alone.returncode == first.returncode == 1
    for result in (alone, first):
        assert result.stdout.startswith("3 files, "), result.stderr[-3000:]
        assert "1 files could not be done" in result.stderr
    assert not second.stdout
    results = [json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("alone", "together")]
    assert results[0] == results[1] and len(results[0]) > 3
    assert {entry["image_id"] for entry in results[0]} == {1, 2, 4}
    names = [sorted(os.listdir(tmp_path / name)) for name in ("alone", "together")]
    assert names[0] == names[1]
