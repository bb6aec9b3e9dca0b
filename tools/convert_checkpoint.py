#!/usr/bin/env python
"""Convert one of the authors' published checkpoints to this project's.

    tools/convert_checkpoint.py r50_ms_smca_e12.pth sam_detr_pp_smca_R_50.pth
    ./train_net.py --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --eval-only MODEL.WEIGHTS sam_detr_pp_smca_R_50.pth

The classifier's 91 outputs, indexed by COCO's category ids, become the 80 of detectron2's COCO datasets. The file carries
the config that fits and COCO's class names, so that tools/predict.py and the like need nothing else.
"""

import argparse
from pathlib import Path

import torch

import samdetr
from samdetr.checkpoint import (
    Checkpoint,
    check_fit,
    convert_published_state_dict,
    describe_run,
    recognize_published,
)
from samdetr.cli.common import run
from samdetr.errors import UserError
from samdetr.modeling.build import build_detector


def convert(source: Path, target: Path, num_classes: int, allow_pickle: bool) -> tuple[str, str]:
    """Convert a file; return the name of the config that fits, and how it was determined.

    Raises:
        UserError: the file cannot be read, is not a published SAM-DETR checkpoint, or ``target`` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it or name another output.")
    try:
        checkpoint = Checkpoint.read(source, name="source", allow_objects=allow_pickle)
    except UserError as error:
        if error.argument != "allow_objects":
            raise
        objects = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(source)))
        raise UserError(
            f"{source} holds Python objects beside tensors ({objects}), and reading such a file can run code that it "
            "carries. If you trust its source, add --allow-pickle."
        ) from error
    try:
        converted = convert_published_state_dict(checkpoint.weights, num_classes)
        config, determined_by = recognize_published(checkpoint.weights, checkpoint.entries, source.name)
    except KeyError as error:
        raise UserError(f"{source} is not a published SAM-DETR checkpoint: it lacks the parameter {error}.") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} cannot be converted: {error}") from error
    cfg = samdetr.load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.SAMDETR.NUM_CLASSES", num_classes])
    model = build_detector(cfg)
    try:
        check_fit(str(source), model, converted, complete=True)
    except UserError as error:
        raise UserError(f"{source} is not of a variant that is known here (tried configs/{config}.yaml).") from error
    extra = sorted(set(converted) - set(model.state_dict()))
    if extra:
        raise UserError(f"{source} has parameters that configs/{config}.yaml lacks, for example {extra[0]}.")
    weights = {name: value.clone() for name, value in converted.items()}
    Checkpoint({"model": weights, **describe_run(cfg)}).write(target)
    return config, determined_by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the authors' .pth file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--num-classes", type=int, default=80, help="80 (default), or 91 to keep COCO's raw ids")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read Python objects as well: only if you trust the file"
    )
    arguments = parser.parse_args()
    config, determined_by = convert(arguments.source, arguments.target, arguments.num_classes, arguments.allow_pickle)
    print(f"Wrote {arguments.target}. It fits configs/{config}.yaml (determined by {determined_by}).")


if __name__ == "__main__":
    run(main)
