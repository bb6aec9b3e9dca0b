#!/usr/bin/env python
"""Measure training steps of a config and of variants of it: time, peak memory, and ratios to the first.

    tools/benchmark.py --config-file configs/sam_detr_digits.yaml \\
        --variant "plain" --variant "bfloat16 SOLVER.AMP.ENABLED True" \\
        --variant "recomputing MODEL.SAMDETR.ACTIVATION_CHECKPOINTING True"

Each variant is a name followed by config options. Each measurement is a process of its own (so that peak memory is its
own); the variants take turns, round by round, so that a machine that slows down slows all of them down. Random images of
--size with --boxes boxes each; a step is data transfer, forward, loss, backward and optimizer, as in training. Memory is the
peak resident size above that before the first step (CUDA: the peak that torch allocated).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

import samdetr
from samdetr.checks import merge_options
from samdetr.engine.train_step import TrainStep
from samdetr.errors import UserError
from samdetr.solver import build_optimizer


def read_config(config_file: str, options: list[str]):
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    merge_options(cfg, config_file, options)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


class RandomBatches:
    """An endless loader of one batch of random images with random boxes."""

    batch_sampler = SimpleNamespace(seed=0)

    def __init__(self, cfg, size: tuple[int, int], num_boxes: int):
        generator = torch.Generator().manual_seed(0)
        height, width = size
        self.batch = []
        for _ in range(cfg.SOLVER.IMS_PER_BATCH):
            corners = torch.rand(num_boxes, 2, 2, generator=generator).sort(1).values.flatten(1)
            instances = Instances(size)
            instances.gt_boxes = Boxes(corners * torch.tensor([width, height, width, height]))
            classes = cfg.MODEL.SAMDETR.NUM_CLASSES
            instances.gt_classes = torch.randint(classes, (num_boxes,), generator=generator)
            image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
            self.batch.append({"image": image, "height": height, "width": width, "instances": instances})

    def __iter__(self):
        while True:
            yield self.batch


def measure(cfg, size: tuple[int, int], num_boxes: int, warmup: int, steps: int) -> dict:
    """Train for a few steps.

    Returns:
        ``seconds`` (median of a step) and ``mebibytes`` (peak above the start).
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    model = build_model(cfg).train()
    average = None
    if cfg.SOLVER.EMA.ENABLED:
        rate = torch.optim.swa_utils.get_ema_multi_avg_fn(cfg.SOLVER.EMA.DECAY)
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=rate)
    step = TrainStep(cfg, model, RandomBatches(cfg, size, num_boxes), build_optimizer(cfg, model))
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    with EventStorage():
        for step.iter in range(warmup + steps):
            if cuda:
                torch.cuda.synchronize()
            before = time.perf_counter()
            step.run_step()
            if average is not None:
                average.update_parameters(model)
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - before)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    mebibytes = torch.cuda.max_memory_allocated() / 2**20 if cuda else (peak - start) / 2**10
    return {"seconds": statistics.median(times[warmup:]), "mebibytes": mebibytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="a config of this project")
    parser.add_argument(
        "--variant", action="append", help="a name, then config options; the first is the base of ratios"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(128, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--boxes", type=int, default=8, help="boxes an image")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each process that are not counted")
    parser.add_argument("--steps", type=int, default=10, help="steps of each process that are counted")
    parser.add_argument("--output", help="also write the table's numbers to this JSON file")
    parser.add_argument("--measure-one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    variants = [variant.split() for variant in arguments.variant or ["plain"]]
    try:
        configs = [read_config(arguments.config_file, options) for _, *options in variants]
    except UserError as error:
        sys.exit(f"error: {error}")
    if arguments.measure_one:
        result = measure(configs[0], tuple(arguments.size), arguments.boxes, arguments.warmup, arguments.steps)
        print(json.dumps(result))
        return
    results: dict[str, list[dict]] = {name: [] for name, *_ in variants}
    height, width = arguments.size
    common = ["--config-file", arguments.config_file, "--size", height, width, "--boxes", arguments.boxes]
    common += ["--warmup", arguments.warmup, "--steps", arguments.steps, "--measure-one"]
    for _ in range(arguments.rounds):
        for name, *options in variants:
            command = [sys.executable, __file__, *map(str, common), "--variant", " ".join([name, *options])]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: variant {name} failed:\n{done.stderr[-2000:]}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    first = medians[variants[0][0]]
    rows = []
    for name, m in medians.items():
        seconds, mebibytes = m["seconds"], m["mebibytes"]
        ratios = seconds / first["seconds"], mebibytes / max(first["mebibytes"], 1)
        rows.append([name, f"{seconds:.3f}", f"{ratios[0]:.2f}", f"{mebibytes:.0f}", f"{ratios[1]:.2f}"])
    print(tabulate(rows, headers=["variant", "s a step", "ratio", "peak MiB", "ratio"], disable_numparse=True))
    if arguments.output:
        with open(arguments.output, "w") as f:
            json.dump({"arguments": sys.argv[1:], "runs": results}, f, indent=1)


if __name__ == "__main__":
    main()
