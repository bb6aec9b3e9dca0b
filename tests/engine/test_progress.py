"""The progress bar: what it shows on a terminal, and that the log's file keeps everything."""

import logging
import sys

import pytest
from detectron2.utils.logger import setup_logger

from helpers import tiny_config
from samdetr.engine import Trainer
from samdetr.engine.progress import ProgressBar

NAMES = ("detectron2", "samdetr")


@pytest.fixture
def loggers():
    """detectron2's loggers, which the test may set up anew."""
    before = {name: list(logging.getLogger(name).handlers) for name in NAMES}
    setup_logger.cache_clear()
    for name in NAMES:
        logging.getLogger(name).handlers.clear()
    yield
    setup_logger.cache_clear()
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers


def run(folder):
    """Train two steps with the console's and the file's log; return the file's."""
    for name in NAMES:
        setup_logger(str(folder), name=name)
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (1,), "DATASETS.TEST", (), "DATALOADER.NUM_WORKERS", 0]
    trainer = Trainer(tiny_config("OUTPUT_DIR", str(folder), *options))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return (folder / "log.txt").read_text()


@pytest.mark.slow
def test_a_terminal_shows_a_bar_in_place_of_lines_of_metrics(loggers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ProgressBar, "is_wanted", staticmethod(lambda: True))
    log = run(tmp_path)
    printed = capsys.readouterr()
    assert "2/2" in printed.err and "loss=" in printed.err
    assert "Starting training" in printed.out + printed.err
    assert "total_loss" not in printed.out and "total_loss" in log
    handlers = logging.getLogger("detectron2").handlers
    assert any(type(handler) is logging.StreamHandler for handler in handlers)  # as before


def test_elsewhere_there_is_no_bar(monkeypatch):
    assert not ProgressBar.is_wanted()
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert ProgressBar.is_wanted()
