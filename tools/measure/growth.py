#!/usr/bin/env python
"""Measure how the cost of a step grows with image size, queries, boxes and batch, and draw it.

    tools/measure/growth.py --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --plot docs/growth.png

One quantity changes at a time, the others stay at --size, --boxes, --batch and the config's number of queries. Time and
memory are those of ``tools/measure/benchmark.py``. Beside them stand the multiply-adds of the forward pass, as counted by
``tools/measure/analyze_model.py`` (for one image, without matching and loss), which shows whether anything grows faster than
the formula.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
from analyze_model import count_flops

from samdetr.cli.benchmark import add_measurement_arguments, measure_variants, parse_variant, print_tables, write_json
from samdetr.cli.common import run
from samdetr.cli.measurement import read_config
from samdetr.modeling.build import build_detector

QUERIES = "MODEL.SAMDETR.NUM_QUERIES"


def make_variants(arguments: argparse.Namespace) -> dict[str, list[tuple[float, dict]]]:
    """Return for each quantity its values, and the variants that have them."""
    pixels = sorted({max(32, round(size / 32) * 32) for size in arguments.sizes})
    words = {
        "image side": [(side, f"size={side}x{side}") for side in pixels],
        "queries": [(number, f"{QUERIES} {number}") for number in arguments.queries],
        "boxes": [(number, f"boxes={number}") for number in arguments.boxes_per_image],
        "batch": [(number, f"batch={number}") for number in arguments.batches],
    }
    return {
        quantity: [
            (value, parse_variant(f"{quantity.replace(' ', '-')}-{value} {text}", arguments)) for value, text in values
        ]
        for quantity, values in words.items()
    }


def multiply_adds(variant: dict) -> int:
    """Count the multiply-adds of the forward pass, for the whole batch of a variant."""
    cfg = read_config(variant["config"], variant["options"])
    return variant["batch"] * count_flops(build_detector(cfg).eval(), *variant["size"])["total"]


def draw(path: str, growth: dict[str, list[dict]], title: str) -> None:
    """Draw one panel per quantity: time, memory and multiply-adds, relative to the first value."""
    figure, axes = plt.subplots(1, len(growth), figsize=(3.2 * len(growth), 3.2), layout="constrained")
    lines = (("seconds", "time", "o-"), ("mebibytes", "peak memory", "s-"), ("multiply_adds", "multiply-adds", "k--"))
    for axis, (quantity, points) in zip(axes, growth.items()):
        for key, label, style in lines:
            axis.plot(
                [p["value"] for p in points], [p[key] / max(points[0][key], 1e-9) for p in points], style, label=label
            )
        axis.set_xlabel({"image side": "image side (pixels)", "boxes": "boxes per image"}.get(quantity, quantity))
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative to the first")
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_measurement_arguments(parser)
    parser.set_defaults(size=(480, 640), rounds=1, warmup=1, steps=3)
    parser.add_argument("--task", choices=("gradients", "inference"), default="gradients")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[256, 384, 512, 640, 768], help="sides of square images"
    )
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 300, 600, 900])
    parser.add_argument("--boxes-per-image", type=int, nargs="+", default=[1, 10, 50, 100])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--plot", required=True, help="PNG or SVG file")
    arguments = parser.parse_args()
    arguments.breakdown = False
    variants = make_variants(arguments)
    flat = [variant for values in variants.values() for _, variant in values]
    results = measure_variants(flat, [arguments.task], arguments)
    for result in results:
        result["multiply_adds"] = multiply_adds(result)
    by_name = {result["name"]: result for result in results}
    growth = {
        quantity: [{"value": value, **by_name[variant["name"]]} for value, variant in values]
        for quantity, values in variants.items()
    }
    print_tables(results)
    if arguments.output:
        write_json(arguments.output, results, arguments)
    draw(arguments.plot, growth, f"{Path(arguments.config_file).stem}, {arguments.task}")


if __name__ == "__main__":
    run(main)
