#!/usr/bin/env python
"""Measure time and memory of configs: the command ``samdetr benchmark``.

tools/measure/benchmark.py --config-file sam_detr_R_50_1x --size 480 640
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("benchmark")
