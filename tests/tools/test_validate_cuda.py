"""tools/measure/validate_cuda.py: a part that fails or takes too long is reported, and the rest goes on."""

import json

import pytest
import validate_cuda

from processes import run_tool

MACHINE = {"card": "H100", "torch": "2.14"}


def test_a_part_that_fails_or_takes_too_long():
    worked, printed = validate_cuda.run_part(
        ["-c", "import os; print(os.environ['WORD']); raise SystemExit(3)"], 60, WORD="hello"
    )
    assert not worked and "hello" in printed
    worked, printed = validate_cuda.run_part(["-c", "import time; time.sleep(60)"], 1)
    assert not worked and printed == "took more than 1 s"
    assert validate_cuda.run_part(["-c", "print(7)"], 60) == (True, "7\n")


def test_a_benchmark_that_cannot_run_is_in_the_report(tmp_path):
    measurement = ("training", "no_such_config", "train", 2, ["torch"])
    part = validate_cuda.run_measurement(measurement, "cuda", tmp_path, 60)
    assert "no_such_config" in part["error"]
    report = {"machine": MACHINE, "tests": {"error": "no pytest"}, "measurements": [part], "kernels": [("gemm", 51.2)]}
    text = validate_cuda.as_markdown(report)
    assert "| card  | H100 |" in text and "Tests: did not run" in text and "no pytest" in text
    assert "training, 2 x 800 x 1333, no_such_config" in text and "failed" in text and "51.2" in text


def test_ratios_are_to_the_first_variant():
    results = [
        {"name": "torch", "seconds": 0.2, "mebibytes": 2048.0},
        {"name": "triton", "seconds": 0.1, "mebibytes": 1024.0},
    ]
    part = {"title": "training", "config": "c", "batch": 2, "size": ["8", "9"], "results": results}
    tests = {"passed": 3, "skipped": 1, "failures": {"test_x": "assert 1 == 2"}}
    text = validate_cuda.as_markdown({"machine": MACHINE, "tests": tests, "measurements": [part]})
    assert "Tests: 3 passed, 1 failed, 1 skipped." in text and "- test_x: assert 1 == 2" in text
    row = next(line for line in text.splitlines() if "triton" in line)
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["triton", "100.0", "1.00", "0.50"]


@pytest.mark.slow
@pytest.mark.thorough
def test_one_measurement_on_the_cpu(tmp_path):
    measurement = validate_cuda.MEASUREMENTS[3]
    part = validate_cuda.run_measurement((*measurement[:4], measurement[4][:1]), "cpu", tmp_path, 300)
    assert [result["name"] for result in part["results"]] == ["torch"], part
    assert part["results"][0]["seconds"] > 0
    assert json.dumps(part)
    assert len(validate_cuda.largest_kernels("cpu")) == 15


def test_without_a_gpu_it_says_what_can_be_done():
    done = run_tool("measure/validate_cuda.py", "--output", "unused", variables={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1] == "error: There is no CUDA device here. --device cpu tries all that needs none."
    )
