"""Measure the steps of one model in this process: time, peak memory, and the share of each part.

``python -m samdetr.cli.measurement REQUEST`` does one measurement of a benchmark and prints it; both are JSON.
"""

import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from ..config import load_config, number_of_classes
from ..engine.train_step import TrainStep
from ..errors import UserError
from ..modeling import SAMDETR, meta_arch
from ..modeling.build import build_detector
from ..solver import MovingAverage, autocast, build_optimizer, set_float32_precision

_PART = "part: "  # how the profiler's ranges of parts begin


def read_config(config_file: str, options: list[str]):
    """Load the config of a variant; a file that is not here is looked up in detectron2's model zoo."""
    try:
        return load_config(config_file, options)
    except UserError as error:
        if error.argument != "config_file":
            raise
        from detectron2 import model_zoo  # importing it warns about setuptools

        with contextlib.suppress(RuntimeError):
            return load_config(model_zoo.get_config_file(config_file), options)
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
    if isinstance(model, SAMDETR):
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
    torch.set_flush_denormal(True)  # as training does
    set_float32_precision(cfg)
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    model = build_detector(cfg).train(task != "inference")
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


def measure_one(request: dict) -> dict:
    """Do one measurement, in its process. The request's fields must not change, so that checkouts can be compared."""
    cfg = read_config(request["config"], request["options"])
    keys = ("task", "batch", "boxes", "warmup", "steps", "with_breakdown")
    return measure(cfg, size=tuple(request["size"]), **{key: request[key] for key in keys})


if __name__ == "__main__":
    print(json.dumps(measure_one(json.loads(sys.argv[1]))))
