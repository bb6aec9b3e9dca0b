#!/usr/bin/env python
"""Convert one of the authors' published checkpoints to this project's.

    tools/convert_checkpoint.py r50_ms_smca_e12.pth sam_detr_pp_smca_R_50.pth
    ./train_net.py --config-file configs/sam_detr_pp_smca_R_50_1x.yaml --eval-only MODEL.WEIGHTS sam_detr_pp_smca_R_50.pth

The classifier's 91 outputs, indexed by COCO's category ids, become the 80 of detectron2's COCO datasets. The file carries
the config that fits and COCO's class names, so that tools/predict.py and the like need nothing else.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import samdetr
from samdetr.checkpoint import convert_published_state_dict
from samdetr.checks import check_loaded
from samdetr.errors import UserError
from samdetr.predictor import self_description

ROOT = Path(__file__).resolve().parent.parent


def read_checkpoint(path: Path, allow_pickle: bool) -> dict:
    """Read a file; Python objects other than tensors and plain containers only with ``allow_pickle``.

    Raises:
        UserError: it is missing, no checkpoint, or holds objects and ``allow_pickle`` is False.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file (looked in {os.getcwd()}).")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except Exception as error:  # torch raises many types for what is no checkpoint
        objects = foreign_objects(path)
        if objects:
            raise UserError(
                f"{path} holds Python objects beside tensors ({', '.join(objects)}), and reading such a file can run "
                "code that it carries. If you trust its source, add --allow-pickle."
            ) from error
        raise UserError(
            f"{path} is truncated, damaged or not a checkpoint ({type(error).__name__}): get it again."
        ) from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint's dict.")
    return checkpoint


def foreign_objects(path: Path) -> list[str]:
    """Names of the Python objects that reading the file would need; empty if it cannot be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # no checkpoint at all, or an older torch
        return []


def recognise(state_dict: dict, checkpoint: dict, name: str) -> tuple[str, str]:
    """Name the config that fits a published state dict.

    The weights tell everything but DC5 (which has no weights of its own) and, where both schedules share an architecture,
    the schedule; these come from the checkpoint's own arguments and epoch if it has them, else from the file's name.

    Returns:
        The config's name, and what it was told by.
    """
    multi_scale = "transformer.level_embed" in state_dict
    numbers = len(state_dict["transformer.decoder.layers.0.point2.6.bias"])
    heads = len(state_dict["transformer.decoder.layers.0.attn1.bias"]) // state_dict["input_proj.0.0.weight"].shape[0]
    smca = numbers == 4 * heads
    lower = name.lower()
    arguments = checkpoint.get("args")
    told = "names and shapes"
    dc5 = False
    if not multi_scale:
        if hasattr(arguments, "dilation"):
            dc5, told = bool(arguments.dilation), f"{told}; DC5 by the checkpoint's arguments"
        else:
            dc5, told = "dc5" in lower, f"{told}; DC5 by the file's name, since the weights do not tell"
        fifty = "input_proj.0.1.weight" not in state_dict
    elif "epoch" in checkpoint:
        fifty, told = checkpoint["epoch"] >= 12, f"{told}; the schedule by the checkpoint's epoch"
    else:
        fifty, told = "50" in lower.replace("r50", ""), f"{told}; the schedule by the file's name"
    parts = ["sam_detr", "pp" if multi_scale else "", "smca" if smca else "", "R_50", "DC5" if dc5 else ""]
    return "_".join(part for part in parts if part) + ("_50ep" if fifty else "_1x"), told


def convert(source: Path, target: Path, num_classes: int, allow_pickle: bool) -> tuple[str, str]:
    """Convert a file; return the fitting config's name and what told it.

    Raises:
        UserError: the file cannot be read, is not a published SAM-DETR checkpoint, or ``target`` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already: remove it or name another output.")
    checkpoint = read_checkpoint(source, allow_pickle)
    state_dict = checkpoint.get("model", checkpoint)
    try:
        converted = convert_published_state_dict(state_dict, num_classes)
        config, told = recognise(state_dict, checkpoint, source.name)
    except KeyError as error:
        raise UserError(f"{source} is not a published SAM-DETR checkpoint: it lacks the parameter {error}.") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{source} cannot be converted: {error}") from error
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / f"{config}.yaml"))
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.SAMDETR.NUM_CLASSES", num_classes])
    model = build_model(cfg)
    try:
        check_loaded(str(source), model, converted, complete=True)
    except UserError as error:
        raise UserError(f"{source} is not of a variant that this tool knows (tried configs/{config}.yaml).") from error
    extra = sorted(set(converted) - set(model.state_dict()))
    if extra:
        raise UserError(f"{source} has parameters that configs/{config}.yaml lacks, for example {extra[0]}.")
    temporary = target.with_name(f"{target.name}.part")
    weights = {name: value.clone() for name, value in converted.items()}
    torch.save({"model": weights, **self_description(cfg)}, temporary)
    os.replace(temporary, target)
    return config, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the authors' .pth file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--num-classes", type=int, default=80, help="80 (default), or 91 to keep COCO's raw ids")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="read Python objects, too: only if you trust the file"
    )
    arguments = parser.parse_args()
    try:
        config, told = convert(arguments.source, arguments.target, arguments.num_classes, arguments.allow_pickle)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {arguments.target}. It fits configs/{config}.yaml (told by {told}).")


if __name__ == "__main__":
    main()
