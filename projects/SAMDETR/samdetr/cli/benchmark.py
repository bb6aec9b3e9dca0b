"""Measure training steps and inference of configs, options or checkouts: time, peak memory, and ratios to the first.

    samdetr benchmark --config-file configs/sam_detr_smca_R_50_1x.yaml --task train inference --size 480 640 --batch 2
    samdetr benchmark --config-file configs/sam_detr_digits.yaml --variant plain \\
        --variant "recomputing MODEL.SAMDETR.ACTIVATION_CHECKPOINTING True" --breakdown
    samdetr benchmark --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --size 480 640 --variant after \\
        --variant "before checkout=../old" --variant "faster_rcnn config=COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

A variant is a name, followed by config options, and by any of ``config=FILE`` (another config; a name in detectron2's model
zoo will do), ``checkout=FOLDER`` (another checkout of this project, which measures itself, with its own code and configs),
``size=HEIGHTxWIDTH``, ``batch=N`` and ``boxes=N``.

Tasks: ``train`` is a whole training step with the optimizer, ``gradients`` forward, loss and backward alone, ``inference``
images to detections. All use random images, random boxes and random weights.

Each measurement is a process of its own (so that its peak memory is its own). The variants take turns, round by round, so
that a machine that slows down slows all of them down. Memory is the peak resident size above that before the first step
(CUDA: the peak that torch allocated). ``--breakdown`` profiles one more step and divides its time among the model's parts;
the backward pass counts where its forward pass was.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate

from ..config import config_folder, find_config
from ..errors import UserError
from .measurement import read_config

TASKS = ("train", "gradients", "inference")
DTYPES = {"float32": None, "bfloat16": "bfloat16", "float16": "float16"}
_MEASUREMENT = ["-m", "samdetr.cli.measurement"]


def parse_variant(text: str, arguments: argparse.Namespace) -> dict:
    """Parse a variant into a dictionary: ``name``, ``config``, ``checkout``, ``size``, ``batch``, ``boxes``, ``options``."""
    name, *words = text.split()
    variant = {
        "name": name,
        "config": arguments.config_file,
        "checkout": None,
        "size": list(arguments.size),
        "batch": arguments.batch,
        "boxes": arguments.boxes,
        "options": [],
    }
    for word in words:
        key, equals, value = word.partition("=")
        try:
            if not equals or key not in variant or key in ("name", "options"):
                variant["options"].append(word)
            elif key == "size":
                height, width = value.split("x")
                variant["size"] = [int(height), int(width)]
            else:
                variant[key] = int(value) if key in ("batch", "boxes") else value
        except ValueError:
            raise UserError(f"--variant {text!r}: {word!r} is not understood; write size=480x640 or batch=2.") from None
    checkout = variant["checkout"]
    if checkout:
        if not (Path(checkout) / "projects" / "SAMDETR" / "samdetr").is_dir():
            raise UserError(f"--variant {text!r}: {checkout} is not a checkout of this project.")
        if own_benchmark(Path(checkout)) is None:
            raise UserError(f"--variant {text!r}: {checkout} has no benchmark of its own to measure itself with.")
        # The config of the same name in that checkout, given as a path or by its name.
        with contextlib.suppress(UserError):
            config = Path(find_config(variant["config"])).resolve()
            root = config_folder().resolve().parent
            there = Path(checkout, config.relative_to(root)) if config.is_relative_to(root) else config
            variant["config"] = str(there if there.is_file() else config)
    variant["options"] += ["MODEL.DEVICE", arguments.device]
    if DTYPES[arguments.precision]:
        variant["options"] += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", DTYPES[arguments.precision]]
    return variant


def own_benchmark(checkout: Path) -> list[str] | None:
    """Return how to call what measures in a checkout, of this or of an older layout; None if it has nothing."""
    if (checkout / "projects" / "SAMDETR" / "samdetr" / "cli" / "measurement.py").is_file():
        return _MEASUREMENT
    places = (checkout / "tools" / "measure" / "benchmark.py", checkout / "tools" / "benchmark.py")
    return next(([str(place.resolve()), "--measure-one"] for place in places if place.is_file()), None)


def run_measurement(variant: dict, task: str, arguments: argparse.Namespace) -> dict:
    """Measure a variant in a process of its own; a checkout measures itself, with its own code."""
    counts = {"warmup": arguments.warmup, "steps": arguments.steps, "with_breakdown": arguments.breakdown}
    environment, called, package = dict(os.environ), _MEASUREMENT, Path(__file__).parents[2]
    if variant["checkout"]:
        called = own_benchmark(Path(variant["checkout"]))
        package = Path(variant["checkout"]).resolve() / "projects" / "SAMDETR"
    environment["PYTHONPATH"] = os.pathsep.join([str(package), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, *called, json.dumps({**variant, **counts, "task": task})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"variant {variant['name']} failed at {task}:\n" + "\n".join(lines[-20:]))
    return json.loads(done.stdout.splitlines()[-1])


def median_of(runs: list[dict]) -> dict:
    """Return the median of every figure over the rounds."""
    result = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "mebibytes")}
    if "breakdown" in runs[0]:
        parts = runs[0]["breakdown"]
        result["breakdown"] = {
            part: statistics.median(run["breakdown"].get(part, 0.0) for run in runs) for part in parts
        }
    return result


def measure_variants(variants: list[dict], tasks: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Measure all variants interleaved; return one result per variant and task: medians over the rounds, and all runs."""
    names = [variant["name"] for variant in variants]
    if len(set(names)) < len(names):
        raise UserError(f"The variants need different names: {', '.join(names)}.")
    runs: dict[tuple[str, str], list[dict]] = {(task, variant["name"]): [] for task in tasks for variant in variants}
    for _ in range(arguments.rounds):
        for task in tasks:
            for variant in variants:
                runs[task, variant["name"]].append(run_measurement(variant, task, arguments))
    return [
        {**variant, "task": task, **median_of(runs[task, variant["name"]]), "runs": runs[task, variant["name"]]}
        for task in tasks
        for variant in variants
    ]


def environment_of(arguments: argparse.Namespace) -> dict:
    """Return what a reader needs to know about the machine."""
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "precision": arguments.precision,
    }


def write_json(path: str, results: list[dict], arguments: argparse.Namespace) -> None:
    report = {"command": sys.argv[1:], "environment": environment_of(arguments), "results": results}
    Path(path).write_text(json.dumps(report, indent=1) + "\n")


def print_tables(results: list[dict]) -> None:
    rows = []
    for result in results:
        first = next(other for other in results if other["task"] == result["task"])
        seconds, mebibytes = result["seconds"], result["mebibytes"]
        ratios = seconds / first["seconds"], mebibytes / max(first["mebibytes"], 1)
        figures = f"{seconds:.3f}", f"{ratios[0]:.2f}", f"{mebibytes:.0f}", f"{ratios[1]:.2f}"
        height, width = result["size"]
        rows.append([result["task"], result["name"], f"{result['batch']} x {height} x {width}", *figures])
    headers = ["task", "variant", "images", "s per step", "ratio", "peak MiB", "ratio"]
    print(tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github"))
    for task in dict.fromkeys(result["task"] for result in results):
        columns = [result for result in results if result["task"] == task and "breakdown" in result]
        if columns:
            parts = dict.fromkeys(part for result in columns for part in result["breakdown"])
            rows = [[p, *(f"{1000 * result['breakdown'].get(p, 0):.0f}" for result in columns)] for p in parts]
            print(f"\n{task}, ms of one step by part, profiled:\n")
            print(tabulate(rows, headers=["part", *(r["name"] for r in columns)], tablefmt="github"))


def add_measurement_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that this command and tools/measure/growth.py share."""
    parser.add_argument("--config-file", required=True, help="a config of this project")
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--boxes", type=int, default=8, help="boxes per image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=DTYPES, default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="processes per variant and task")
    parser.add_argument("--warmup", type=int, default=3, help="steps per process that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="steps per process that are counted")
    parser.add_argument("--output", help="also write all figures to this JSON file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_measurement_arguments(parser)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["train"])
    parser.add_argument("--variant", action="append", help="see above; the first is the base of the ratios")
    parser.add_argument("--breakdown", action="store_true", help="divide the time among the model's parts")


def main(arguments: argparse.Namespace) -> None:
    for name, least in (("rounds", 1), ("steps", 1), ("warmup", 0)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} is {getattr(arguments, name)}: it must be {least} or more.")
    variants = [parse_variant(variant, arguments) for variant in arguments.variant or ["plain"]]
    for variant in variants:
        if not variant["checkout"]:  # so that a mistake is found before anything is measured
            read_config(variant["config"], variant["options"])
    results = measure_variants(variants, arguments.task, arguments)
    print_tables(results)
    if arguments.output:
        write_json(arguments.output, results, arguments)
