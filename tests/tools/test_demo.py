"""tools/demo.py, and what every tool has in common."""

import contextlib
import json
import os
import signal
import time

import pytest

from helpers import ROOT
from processes import Script, run_tool


@pytest.mark.slow
def test_the_demo_from_start_to_picture(tmp_path):
    """With a model of seconds; the real demo's AP is in the README."""
    quick = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "MODEL.SAMDETR.HIDDEN_DIM", 32, "DATALOADER.NUM_WORKERS", 0]
    result = run_tool("demo.py", "--output", tmp_path / "demo", *quick, "DATASETS.TEST", "('digits_val_20',)")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Box AP on digits_val_20: " in result.stdout and "predictions.png" in result.stdout
    assert (tmp_path / "demo" / "predictions.png").stat().st_size > 10000
    lines = (tmp_path / "demo" / "metrics.json").read_text().splitlines()
    assert any("bbox/AP" in json.loads(line) for line in lines)
    # Another demo, one that fails at once, leaves the first as it was, under another name.
    result = run_tool("demo.py", "--output", tmp_path / "demo", "SOLVER.MAX_ITERS", 2)
    assert result.returncode == 1 and "SOLVER.MAX_ITER" in result.stderr
    (earlier,) = tmp_path.glob("demo-until-*")
    assert (earlier / "predictions.png").exists() and (earlier / "metrics.json").read_text().splitlines() == lines


@pytest.mark.slow
@pytest.mark.thorough
def test_a_demo_that_is_stopped_waits_for_its_training_to_save(tmp_path):
    quick = ["MODEL.SAMDETR.HIDDEN_DIM", 32, "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "('digits_val_20',)"]
    script = Script("tools/demo.py", "--output", tmp_path / "demo", *quick, group=True)
    log, deadline = tmp_path / "demo" / "log.txt", time.time() + 300
    while not (log.exists() and "iter: 19" in log.read_text()) and time.time() < deadline and script.process.is_alive():
        time.sleep(0.1)
    os.kill(script.process.pid, signal.SIGTERM)
    try:
        result = script.wait(60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.process.pid, signal.SIGKILL)  # whatever it has left
    assert result.returncode == 143 and "Continue with: --resume" in result.stderr
    assert (tmp_path / "demo" / "last_checkpoint").read_text().startswith("model_")


def test_every_tool_is_executable_and_explains_itself():
    for tool in sorted((ROOT / "tools").rglob("*.py")):
        text = tool.read_text()
        if text.startswith("#!"):
            assert os.access(tool, os.X_OK), f"{tool} is not executable"
            if tool.name not in ("install.py",):
                assert str(tool.relative_to(ROOT)) in text.split('"""')[1], f"{tool} shows no example"
