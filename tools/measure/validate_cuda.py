#!/usr/bin/env python
"""Validate this project on the GPU at hand, in ten minutes: correctness, time, memory, waits, largest kernels.

    tools/measure/validate_cuda.py --output output/cuda
    tools/measure/validate_cuda.py --output output/cuda --minutes 30          # more of the benchmark
    tools/measure/validate_cuda.py --output output/cuda_tried --device cpu    # leaves out what needs the card

Runs the tests that compare CUDA with the CPU (``tests/cuda``) and Triton's kernels with their plain twins, then the benchmark:
torch's kernels against Triton's; float32, TF32 and bfloat16; 2 and 16 images; beside detectron2's Faster R-CNN. Writes
``validation.json`` and ``validation.md`` after every part, and goes on if a part fails or takes too long.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from tabulate import tabulate

import samdetr
from samdetr.cli.common import run
from samdetr.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = ["800", "1333"]
THREE_LEVELS = "sam_detr_pp_smca_dn_R_50_1x"
TF32, BFLOAT16 = "FLOAT32_PRECISION high", "SOLVER.AMP.ENABLED True"
TRITON, FASTER_RCNN = "MODEL.SAMDETR.KERNELS triton", "config=COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
# What is measured, the most important first: title, config, task, images, and variants.
MEASUREMENTS = [
    (
        "training",
        THREE_LEVELS,
        "train",
        2,
        ["torch", f"triton {TRITON}", f"tf32 {TF32}", f"tf32-triton {TF32} {TRITON}", f"bf16 {BFLOAT16}"],
    ),
    ("training", THREE_LEVELS, "train", 2, [f"bf16-triton {BFLOAT16} {TRITON}", f"faster_rcnn-tf32 {FASTER_RCNN} {TF32}"]),
    ("training", "sam_detr_smca_R_50_1x", "train", 2, ["torch", f"triton {TRITON}", f"tf32 {TF32}", f"bf16 {BFLOAT16}"]),
    ("inference", THREE_LEVELS, "inference", 1, ["torch", f"triton {TRITON}", f"bf16 {BFLOAT16}", f"rcnn {FASTER_RCNN}"]),
    ("training", THREE_LEVELS, "train", 16, [f"bf16 {BFLOAT16}", f"bf16-triton {BFLOAT16} {TRITON}"]),
    ("training", "sam_detr_smca_R_50_DC5_1x", "train", 2, ["torch", f"triton {TRITON}", f"bf16 {BFLOAT16}"]),
    ("training", "sam_detr_plus_R_50_1x", "train", 2, ["torch", f"bf16-triton {BFLOAT16} {TRITON}"]),
]  # fmt: skip


def describe_machine(device: str) -> dict:
    """Return the card, and the versions of what matters."""
    card = {"card": "none (tried on the CPU)"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        card = {
            "card": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "none"
    return {
        **card,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
    }


def run_part(command: list[str], seconds: float, **environment: str) -> tuple[bool, str]:
    """Run a part in a process of its own; return whether it succeeded, and the end of what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command],
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
            cwd=ROOT,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return False, f"took more than {seconds:.0f} s"
    return done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def run_tests(device: str, output: Path, seconds: float) -> dict:
    """Run the tests; return how many passed, failed and were skipped, and what failed."""
    report = output / "tests.xml"
    report.unlink(missing_ok=True)
    command = ["-m", "pytest", "-q", "tests/cuda", "tests/ops/test_triton.py", f"--junitxml={report}"]
    _, printed = run_part(command, seconds, SAMDETR_TEST_DEVICE=device)
    if not report.exists():
        return {"error": printed}
    counts = {"passed": 0, "skipped": 0, "failures": {}}
    for case in ElementTree.parse(report).iter("testcase"):
        broken = [part for kind in ("failure", "error") for part in case.iter(kind)]
        if broken:
            counts["failures"][case.get("name")] = broken[0].get("message", "")[:500]
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts


def run_measurement(measurement: tuple, device: str, output: Path, seconds: float) -> dict:
    """Run the benchmark once, or say why it did not work."""
    title, config, task, batch, variants = measurement
    size = SIZE
    if device == "cpu":  # as small as can be: to see that it works
        config, size, batch = "quick_schedules/sam_detr_digits_instant_test", ["64", "64"], 2
        variants = [variant for variant in variants if "config=" not in variant]
    file = output / "benchmark.json"
    file.unlink(missing_ok=True)
    command = [
        "tools/measure/benchmark.py",
        "--config-file",
        config,
        "--task",
        task,
        "--size",
        *size,
        "--batch",
        str(batch),
    ]
    command += ["--rounds", "1", "--device", device, "--output", str(file), "--breakdown"]
    command += [word for variant in variants for word in ("--variant", f"{variant} MODEL.WEIGHTS ''")]
    worked, printed = run_part(command, seconds)
    described = {"title": title, "config": config, "batch": batch, "size": size}
    if not worked or not file.exists():
        return {**described, "error": printed}
    keys = "name", "seconds", "mebibytes", "breakdown"
    return {**described, "results": [{key: r[key] for key in keys} for r in json.loads(file.read_text())["results"]]}


def largest_kernels(device: str) -> list[tuple[str, float]]:
    """Return the kernels that take most of a training step of three levels, with their share of the time in percent."""
    from detectron2.utils.events import EventStorage

    from samdetr.cli.measurement import RandomBatches, make_step
    from samdetr.modeling.build import build_detector

    name = THREE_LEVELS if device == "cuda" else "quick_schedules/sam_detr_digits_instant_test"
    size = (800, 1333) if device == "cuda" else (64, 64)
    cfg = samdetr.load_config(name, ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""])
    step = make_step(
        cfg, "train", build_detector(cfg).train(), RandomBatches(2, size, 8, cfg.MODEL.SAMDETR.NUM_CLASSES)
    )
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with EventStorage():
        for iteration in range(3):
            step(iteration)
        with torch.profiler.profile(activities=activities) as profile:
            step(3)
    events = profile.key_averages()
    times = {
        event.key: event.self_device_time_total if device == "cuda" else event.self_cpu_time_total for event in events
    }
    total = sum(times.values()) or 1
    largest = sorted(times.items(), key=lambda item: -item[1])[:15]
    return [(name, round(100 * value / total, 1)) for name, value in largest]


def as_markdown(report: dict) -> str:
    """Return the report as tables."""
    lines = ["# Validation on CUDA", "", tabulate(report["machine"].items(), tablefmt="github"), ""]
    tests = report.get("tests", {})
    if "error" in tests:
        lines += ["Tests: did not run.", "", "```", tests["error"], "```", ""]
    elif tests:
        lines += [f"Tests: {tests['passed']} passed, {len(tests['failures'])} failed, {tests['skipped']} skipped.", ""]
        lines += [
            f"- {name}: {message.splitlines()[0] if message else ''}" for name, message in tests["failures"].items()
        ]
    rows = []
    for part in report.get("measurements", []):
        what = f"{part['title']}, {part['batch']} x {' x '.join(part['size'])}, {part['config']}"
        if "error" in part:
            rows.append([what, "failed", "", "", part["error"].strip().splitlines()[-1][:100]])
        for result in part.get("results", []):
            first = part["results"][0]
            rows.append([what, result["name"], f"{1000 * result['seconds']:.1f}", f"{result['mebibytes'] / 1024:.2f}",
                         f"{result['seconds'] / first['seconds']:.2f}"])  # fmt: skip
    headers = ["what", "variant", "ms per step", "peak GiB", "ratio"]
    lines += ["", tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True), ""]
    if "kernels" in report:
        lines += [
            tabulate(
                report["kernels"], headers=["largest kernels of a training step", "% of the time"], tablefmt="github"
            )
        ]
    if "waits" in report:
        lines += [
            "",
            f"Waits, operations, traffic and memory as counted without the card: {json.dumps(report['waits'])}",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for validation.json and validation.md")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything together")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no CUDA device here. --device cpu tries all that needs none.")
    if arguments.minutes <= 0:
        raise UserError(f"--minutes is {arguments.minutes}: it must be more than 0.")
    output = Path(arguments.output).resolve()  # its parts run in the project's folder
    output.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    report: dict = {"machine": describe_machine(arguments.device)}

    def keep(name: str, value) -> None:
        report[name] = value
        (output / "validation.json").write_text(json.dumps(report, indent=1) + "\n")
        (output / "validation.md").write_text(as_markdown(report))
        print(f"{name}: done, {end - time.monotonic():.0f} s left", flush=True)

    keep("tests", run_tests(arguments.device, output, 0.4 * (end - time.monotonic())))
    command = ["tools/measure/cuda_cost.py", "--config-file", THREE_LEVELS]
    worked, printed = run_part(command, 120)
    found = next((line for line in printed.splitlines() if line.startswith("{")), None)  # others are warnings
    keep("waits", json.loads(found) if worked and found else {"error": printed})
    measurements: list[dict] = []
    for measurement in MEASUREMENTS:
        left = end - time.monotonic()
        if left < 30:
            skipped = {"title": measurement[0], "config": measurement[1], "batch": measurement[3], "size": SIZE}
            measurements.append({**skipped, "error": "no time was left: raise --minutes"})
            continue
        measurements.append(run_measurement(measurement, arguments.device, output, left))
        keep("measurements", measurements)
    try:
        keep("kernels", largest_kernels(arguments.device))
    except Exception as error:  # whatever it is, the rest stays
        keep("kernels", [(f"failed: {error}", 0.0)])
    print(f"{output / 'validation.md'}")


if __name__ == "__main__":
    run(main)
