"""Measure the AP of a checkpoint on the DATASETS.TEST of its config.

    samdetr evaluate --weights output/demo/model_final.pth
    samdetr evaluate --weights model_final.pth DATASETS.TEST "('my_test',)"
    samdetr evaluate --config-file sam_detr_pp_smca_R_50_1x --num-gpus 8 MODEL.WEIGHTS converted.pth

Without --config-file, the config is the one that the checkpoint carries. Everything is written to its OUTPUT_DIR. The options
are those of ``samdetr train``.
"""

import argparse

from . import train

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.set_defaults(eval_only=True)


main = train.main
