#!/usr/bin/env python
"""Measure training steps and inference of configs, options or checkouts: time, peak memory, and ratios to the first.

    tools/measure/benchmark.py --config-file configs/sam_detr_smca_R_50_1x.yaml --task train inference --size 480 640 --batch 2
    tools/measure/benchmark.py --config-file configs/sam_detr_digits.yaml --variant plain \\
        --variant "recomputing MODEL.SAMDETR.ACTIVATION_CHECKPOINTING True" --breakdown
    tools/measure/benchmark.py --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --size 480 640 --variant after \\
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
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

import samdetr
from samdetr.config import find_config, number_of_classes
from samdetr.engine.train_step import TrainStep
from samdetr.errors import UserError
from samdetr.modeling import meta_arch
from samdetr.solver import MovingAverage, autocast, build_optimizer, set_float32_precision

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the folder of common.py
from common import run

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("train", "gradients", "inference")
DTYPES = {"float32": None, "bfloat16": "bfloat16", "float16": "float16"}
_PART = "part: "  # how the profiler's ranges of parts begin


def read_config(config_file: str, options: list[str]):
    """Load the config of a variant; a file that is not here is looked up in detectron2's model zoo."""
    try:
        return samdetr.load_config(config_file, options)
    except UserError as error:
        if error.argument != "config_file":
            raise
        from detectron2 import model_zoo  # importing it warns about setuptools

        with contextlib.suppress(RuntimeError):
            return samdetr.load_config(model_zoo.get_config_file(config_file), options)
        raise


class RandomBatches:
    """An endless loader of one batch of random images with random boxes."""

    seed = 0

    def __init__(self, batch: int, size: tuple[int, int], num_boxes: int, num_classes: int):
        generator = torch.Generator().manual_seed(0)
        height, width = size
        self.batch = []
        for _ in range(batch):
            corners = torch.rand(num_boxes, 2, 2, generator=generator).sort(1).values.flatten(1)
            instances = Instances(size)
            instances.gt_boxes = Boxes(corners * torch.tensor([width, height, width, height]))
            instances.gt_classes = torch.randint(num_classes, (num_boxes,), generator=generator)
            image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
            self.batch.append({"image": image, "height": height, "width": width, "instances": instances})

    def __iter__(self):
        while True:
            yield self.batch


def make_step(cfg, task: str, model: torch.nn.Module, loader: RandomBatches):
    """Return a function of the iteration's number that does one step of the task."""

    device = torch.device(cfg.MODEL.DEVICE)
    if task == "inference":

        def infer(iteration: int) -> None:
            with torch.no_grad(), autocast(cfg, device):
                model(loader.batch)

        return infer
    if task == "gradients":

        def differentiate(iteration: int) -> None:
            model.zero_grad()
            with autocast(cfg, device):
                losses = model(loader.batch)
            sum(losses.values()).backward()

        return differentiate
    average = None
    if cfg.SOLVER.EMA.ENABLED:
        average = MovingAverage(model, cfg.SOLVER.EMA.DECAY)
    trainer = TrainStep(cfg, model, loader, build_optimizer(cfg, model))

    def train(iteration: int) -> None:
        trainer.iter = iteration
        trainer.run_step()
        if average is not None:
            average.update_parameters(model)

    return train


class Annotated:
    """A callable that is not a module, as a range in the profiler."""

    def __init__(self, name: str, inner):
        self.name, self.inner = name, inner

    def __call__(self, *args, **kwargs):
        with torch.profiler.record_function(_PART + self.name):
            return self.inner(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)


@contextlib.contextmanager
def annotated_parts(model: torch.nn.Module):
    """Show the profiler the model's parts: its children and, in a SAMDETR, the parts of its decoder and of its loss."""
    modules = {name: [child] for name, child in model.named_children()}
    decoder = getattr(model, "decoder", None)
    for layer in getattr(decoder, "layers", ()):
        for name, child in layer.named_children():
            if not name.endswith("_norm"):
                modules.setdefault(f"decoder: {name}", []).append(child)
    replaced = [(module, "forward", name) for name, group in modules.items() for module in group]
    if isinstance(model, samdetr.SAMDETR):
        replaced += [(model.criterion, "matcher", "matcher"), (model, "criterion", "loss")]
        replaced += [(meta_arch, "select_detections", "post-processing")]
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in replaced:
            stack.enter_context(mock.patch.object(owner, attribute, Annotated(name, getattr(owner, attribute))))
        yield


def breakdown(step, iteration: int, model: torch.nn.Module, cuda: bool) -> dict[str, float]:
    """Return the seconds of one step by part, with the overhead of profiling; what belongs to no part is ``other``."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with annotated_parts(model), torch.profiler.profile(activities=activities) as profile:
        step(iteration)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    # Autograd numbers its nodes, per thread, in the order of the operations that made them.
    part_of_sequence: dict[tuple[int, int], str] = {}

    def part_of(event) -> str:
        while event is not None:
            if event.name.startswith(_PART):
                return event.name.removeprefix(_PART)
            if event.name.startswith(("Optimizer.step", "Optimizer.zero_grad")):
                return "optimizer"
            if event.name.startswith("autograd::engine::evaluate_function"):
                return part_of_sequence.get((event.fwd_thread, event.sequence_nr), "other")
            event = event.cpu_parent
        return "other"

    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::"):
            part_of_sequence[event.thread, event.sequence_nr] = part_of(event)
    microseconds: Counter[str] = Counter()
    for event in events:
        microseconds[part_of(event)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    return {part: value / 1e6 for part, value in microseconds.most_common()}


def resident_kibibytes() -> float:
    """Return the memory that this process holds or, where that is unknown, the most that it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(
    cfg, task: str, size: tuple[int, int], batch: int, boxes: int, warmup: int, steps: int, with_breakdown: bool
) -> dict:
    """Measure a few steps of one task.

    Returns:
        ``seconds`` (median of a step), ``mebibytes`` (peak above the start) and, if asked for, ``breakdown`` (seconds by
        part).
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # as train_net.py does
    set_float32_precision(cfg)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    model = build_model(cfg).train(task != "inference")
    step = make_step(cfg, task, model, RandomBatches(batch, size, boxes, number_of_classes(cfg)[1] or 1))
    start = resident_kibibytes()
    times = []
    with EventStorage():
        for iteration in range(warmup + steps):
            if cuda:
                torch.cuda.synchronize()
            before = time.perf_counter()
            step(iteration)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mebibytes = torch.cuda.max_memory_allocated() / 2**20 if cuda else (peak - start) / 2**10
        result = {"seconds": statistics.median(times[warmup:]), "mebibytes": mebibytes}
        if with_breakdown:
            result["breakdown"] = breakdown(step, warmup + steps, model, cuda)
    return result


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
            there = Path(checkout, config.relative_to(ROOT)) if config.is_relative_to(ROOT) else config
            variant["config"] = str(there if there.is_file() else config)
    variant["options"] += ["MODEL.DEVICE", arguments.device]
    if DTYPES[arguments.precision]:
        variant["options"] += ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", DTYPES[arguments.precision]]
    return variant


def own_benchmark(checkout: Path) -> Path | None:
    """Return the benchmark script of a checkout, of this or of an older layout; None if it has none."""
    places = (checkout / "tools" / "measure" / "benchmark.py", checkout / "tools" / "benchmark.py")
    return next((place for place in places if place.is_file()), None)


def run_measurement(variant: dict, task: str, arguments: argparse.Namespace) -> dict:
    """Measure a variant in a process of its own; a checkout measures itself, with its own script and package."""
    counts = {"warmup": arguments.warmup, "steps": arguments.steps, "with_breakdown": arguments.breakdown}
    environment, script = dict(os.environ), __file__
    if variant["checkout"]:
        script = str(own_benchmark(Path(variant["checkout"])).resolve())
        package = str(Path(variant["checkout"]).resolve() / "projects" / "SAMDETR")
        environment["PYTHONPATH"] = os.pathsep.join([package, environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, script, "--measure-one", json.dumps({**variant, **counts, "task": task})]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"variant {variant['name']} failed at {task}:\n" + "\n".join(lines[-20:]))
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(request: dict) -> dict:
    """Do one measurement, in its process. The request's fields must not change, so that checkouts can be compared."""
    cfg = read_config(request["config"], request["options"])
    keys = ("task", "batch", "boxes", "warmup", "steps", "with_breakdown")
    return measure(cfg, size=tuple(request["size"]), **{key: request[key] for key in keys})


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
    """Add the options that the benchmarks of this folder share."""
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


def main() -> None:
    if sys.argv[1:2] == ["--measure-one"]:
        print(json.dumps(measure_one(json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measurement_arguments(parser)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=["train"])
    parser.add_argument("--variant", action="append", help="see above; the first is the base of the ratios")
    parser.add_argument("--breakdown", action="store_true", help="divide the time among the model's parts")
    arguments = parser.parse_args()
    variants = [parse_variant(variant, arguments) for variant in arguments.variant or ["plain"]]
    for variant in variants:
        if not variant["checkout"]:  # so that a mistake is found before anything is measured
            read_config(variant["config"], variant["options"])
    results = measure_variants(variants, arguments.task, arguments)
    print_tables(results)
    if arguments.output:
        write_json(arguments.output, results, arguments)


if __name__ == "__main__":
    run(main)
