#!/usr/bin/env python
"""Count a model's parameters and multiply-adds, part by part, beside the paper's figures.

    tools/analyze_model.py --config-file configs/sam_detr_smca_R_50_1x.yaml
    tools/analyze_model.py --config-file configs/sam_detr_pp_R_50_1x.yaml --size 800 1066
    tools/analyze_model.py --config-file configs/sam_detr_R_50_1x.yaml --num-images 100

Method: fvcore's FlopCountAnalysis of the evaluation model, one image; a fused multiply-add counts as one FLOP, as in the
paper's and detectron2's tables. To what fvcore counts (convolutions, matrix products, norms, bilinear sampling) comes
attention inside scaled_dot_product_attention. RoIAlign, which is matrix products here and which the published code's count
leaves out (there it is a compiled op), has a row of its own.
"""

import argparse
import contextlib
import sys
from collections import Counter
from unittest import mock

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import nn

import samdetr
from samdetr.checks import check_config, merge_options
from samdetr.data import build_test_loader
from samdetr.errors import UserError

# Params (M) and GFLOPs of the paper's Table 1 (GFLOPs: means over COCO images), by family; the same with SMCA and DN.
PAPER = {"R_50": (57, 107), "DC5": (57, 229), "pp": (55, 203)}
PARTS = {
    "backbone": "backbone",
    "feature_projection": "input projections",
    "encoder": "encoder",
    "query_generator": "queries",
    "decoder": "decoder",
}
DECODER_PARTS = ("self_attention", "aligner", "cross_attention", "feedforward", "class_heads", "box_heads")


class ImageModel(nn.Module):
    """The network alone, from a normalised image to the predictions."""

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        predictions, _ = self.model.decode(image, [self.size], None)
        return predictions["pred_logits"], predictions["pred_boxes"]


def attention_flops(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of scaled_dot_product_attention: query times key, weights times value."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    products = int(np.prod(query)) * key[-2] + int(np.prod(query[:-1])) * value[-2] * value[-1]
    return Counter({"attention": products})


def matmul_flops(inputs: list, outputs: list) -> Counter:
    """Multiply-adds of a matrix product, broadcast dimensions included (fvcore's own handler leaves those out)."""
    return Counter({"matmul": int(np.prod(get_shape(outputs[0]))) * get_shape(inputs[0])[-1]})


def pooled_zeros(features, rows, columns):
    """In the place of RoIAlign, free of cost."""
    return features.new_zeros([int(n) for n in (*rows.shape[:3], columns.shape[2], features.shape[-1])])


def sampled_zeros(features, rows, columns):
    """In the place of RoIAlign followed by bilinear sampling, free of cost."""
    return features.new_zeros([int(n) for n in (*rows.shape[:2], features.shape[-1])])


@torch.no_grad()
def count_flops(model: nn.Module, height: int, width: int) -> Counter:
    """Multiply-adds by part, RoIAlign's by itself under ``roi_align``; ``total`` is all of it.

    Args:
        model: a SAMDETR in evaluation mode.
        height, width: of the image, in pixels.
    """
    divisor = max(model.backbone.size_divisibility, 1)
    image = torch.zeros(1, 3, -(-height // divisor) * divisor, -(-width // divisor) * divisor, device=model.device)
    counted = []
    for replaced in ({}, {"roi_align": pooled_zeros, "sample_separably": sampled_zeros}):
        with mock.patch.multiple(samdetr.semantics_aligner, **replaced) if replaced else contextlib.nullcontext():
            analysis = FlopCountAnalysis(ImageModel(model, (height, width)), (image,))
            analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
            analysis.set_op_handle("aten::matmul", matmul_flops)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            counted.append(analysis.by_module())
    modules, without_roi_align = counted
    prefix = "model.model."  # the tracing adapter's and this tool's wrapper
    counts = Counter({part: modules[prefix + part] for part in PARTS})
    for name, flops in modules.items():
        pieces = name.removeprefix(f"{prefix}decoder.").split(".")
        if name.startswith(f"{prefix}decoder.layers.") and len(pieces) == 3:
            counts[f"decoder.{pieces[2]}"] += flops
        elif name.startswith(f"{prefix}decoder.") and pieces[0].endswith("_heads") and len(pieces) == 1:
            counts[f"decoder.{pieces[0]}"] += flops
    counts["roi_align"] = modules[""] - without_roi_align[""]
    counts["total"] = modules[""]
    return counts


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(all, trainable) parameters by part; frozen norms' statistics are buffers and count in neither."""

    def of(module: nn.Module) -> tuple[int, int]:
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    counts = {part: of(getattr(model, part)) for part in PARTS}
    for part in DECODER_PARTS:
        modules = [getattr(layer, part) for layer in model.decoder.layers if hasattr(layer, part)]
        counts[f"decoder.{part}"] = of(nn.ModuleList(modules or [getattr(model.decoder, part)]))
    counts["total"] = of(model)
    return counts


def family_of(cfg) -> str | None:
    """Which of the paper's rows a config of this project belongs to."""
    if cfg.MODEL.RESNETS.DEPTH != 50 or cfg.MODEL.SAMDETR.HIDDEN_DIM != 256 or cfg.MODEL.SAMDETR.NUM_CLASSES != 80:
        return None
    if len(cfg.MODEL.SAMDETR.IN_FEATURES) == 3:
        return "pp"
    return "DC5" if cfg.MODEL.RESNETS.RES5_DILATION == 2 else "R_50"


def image_sizes(arguments, cfg) -> list[tuple[int, int]]:
    """Sizes (height, width) to average over."""
    if not arguments.num_images:
        return [tuple(arguments.size)]
    check_config(cfg, training=False)
    sizes = []
    for inputs in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        sizes.append(tuple(inputs[0]["image"].shape[1:]))
        if len(sizes) == arguments.num_images:
            break
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="a config of this project")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num-images", type=int, default=0, help="average over the first N images of DATASETS.TEST")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE")
    arguments = parser.parse_args()
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    try:
        merge_options(cfg, arguments.config_file, arguments.opts)
        if cfg.MODEL.META_ARCHITECTURE != "SAMDETR":
            raise UserError(f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}: this tool counts SAMDETR.")
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
        sizes = image_sizes(arguments, cfg)
    except UserError as error:
        sys.exit(f"error: {error}")
    model = build_model(cfg).eval()
    parameters = count_parameters(model)
    flops: Counter = Counter()
    for size, times in Counter(sizes).items():
        for part, count in count_flops(model, *size).items():
            flops[part] += count * times / len(sizes)

    def row(label: str, part: str) -> list:
        total, trainable = parameters.get(part, (0, 0))
        return [label, f"{total / 1e6:.2f}", f"{trainable / 1e6:.2f}", f"{flops[part] / 1e9:.1f}"]

    rows = [row(label, part) for part, label in PARTS.items()]
    rows += [row(f"  of it {part.replace('_', ' ')}", f"decoder.{part}") for part in DECODER_PARTS]
    rows.append(["  of it RoIAlign", "", "", f"{flops['roi_align'] / 1e9:.1f}"])
    rows.append(row("total", "total"))
    rows.append(["total without RoIAlign", "", "", f"{(flops['total'] - flops['roi_align']) / 1e9:.1f}"])
    family = family_of(cfg)
    if family:
        rows.append(["the paper's Table 1", PAPER[family][0], "", PAPER[family][1]])
    print(
        tabulate(
            rows, headers=["part", "params (M)", "trainable (M)", "GFLOPs"], disable_numparse=True, stralign="left"
        )
    )
    where = f"{sizes[0][0]} x {sizes[0][1]}" if not arguments.num_images else f"mean over {len(sizes)} images"
    print(f"\nGFLOPs: {where}; fvcore, a multiply-add counts once. The paper's are means over COCO images.")


if __name__ == "__main__":
    main()
