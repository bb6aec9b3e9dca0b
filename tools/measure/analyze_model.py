#!/usr/bin/env python
"""Count a model's parameters and multiply-adds, part by part, beside the paper's figures.

    tools/measure/analyze_model.py --config-file configs/sam_detr_smca_R_50_1x.yaml
    tools/measure/analyze_model.py --config-file configs/sam_detr_pp_R_50_1x.yaml --size 800 1066
    tools/measure/analyze_model.py --config-file configs/sam_detr_R_50_1x.yaml --num-images 100
    tools/measure/analyze_model.py --config-file configs/baselines/fcos_R_50_FPN_1x.yaml
    tools/measure/analyze_model.py --published docs/published_results.csv > table.md

--published prints the paper's Table 1 with what is measured here beside it, for every row that has a config here.

Method: fvcore's FlopCountAnalysis of the evaluation model, one image; a fused multiply-add counts as one FLOP, as in the
tables of the paper and of detectron2. Attention inside scaled_dot_product_attention is added to what fvcore counts
(convolutions, matrix products, norms, bilinear sampling). RoIAlign has a row of its own: here it is matrix products, while
the published code uses a compiled op, which its count leaves out. detectron2's detectors are counted without RoIAlign and
NMS; the second stage of a two-stage detector gets the maximum number of proposals (RPN.POST_NMS_TOPK_TEST).
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import nn

import samdetr
from samdetr.checks import check_config
from samdetr.cli.common import run
from samdetr.config import config_folder
from samdetr.data import build_test_loader, register_datasets
from samdetr.errors import UserError
from samdetr.modeling import semantics_aligner
from samdetr.modeling.build import build_detector
from samdetr.modeling.meta_arch import SetDetector

# Params (M) and GFLOPs of the paper's Table 1 (GFLOPs: means over COCO images), by family; the same with SMCA and DN.
PAPER = {"R_50": (57, 107), "DC5": (57, 229), "pp": (55, 203)}
PARTS = {
    "backbone": "backbone",
    "feature_projection": "input projections",
    "encoder": "encoder",
    "query_generator": "queries",
    "decoder": "decoder",
    "dense_head": "dense head (training)",
}
DECODER_PARTS = ("self_attention", "aligner", "cross_attention", "feedforward", "class_heads", "box_heads")


class ImageModel(nn.Module):
    """The network alone, from a normalised image to the predictions."""

    def __init__(self, model: nn.Module, size: tuple[int, int]):
        super().__init__()
        self.model = model
        self.size = size

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        predictions, _ = self.model.decode(self.model.encode(image, [self.size]))
        return predictions.logits, predictions.boxes


def attention_flops(inputs: list, outputs: list) -> Counter:
    """Count the multiply-adds of scaled_dot_product_attention: query times key, weights times value."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    products = int(np.prod(query)) * key[-2] + int(np.prod(query[:-1])) * value[-2] * value[-1]
    return Counter({"attention": products})


def matmul_flops(inputs: list, outputs: list) -> Counter:
    """Count the multiply-adds of a matrix product, broadcast dimensions included (fvcore's handler leaves those out)."""
    return Counter({"matmul": int(np.prod(get_shape(outputs[0]))) * get_shape(inputs[0])[-1]})


def pooled_zeros(features, rows, columns):
    """Return zeros in place of RoIAlign, to count a model without it."""
    return features.new_zeros([int(n) for n in (*rows.shape[:3], columns.shape[2], features.shape[-1])])


def sampled_zeros(features, rows, columns):
    """Return zeros in place of RoIAlign followed by bilinear sampling."""
    return features.new_zeros([int(n) for n in (*rows.shape[:2], features.shape[-1])])


def analyze(model: nn.Module, inputs: tuple) -> Counter:
    """Count multiply-adds by module."""
    analysis = FlopCountAnalysis(model, inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    analysis.set_op_handle("aten::matmul", matmul_flops)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a single operation, which fvcore does not know
    try:
        return analysis.by_module()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@torch.no_grad()
def propose_anchors(model: nn.Module) -> None:
    """Let a two-stage detector's first stage propose its anchors, all of them, so that the second gets its full number."""
    first_stage = getattr(model, "proposal_generator", None)
    if first_stage is not None:
        for parameter in first_stage.rpn_head.anchor_deltas.parameters():
            parameter.zero_()
        first_stage.nms_thresh = 1.0


@torch.no_grad()
def count_flops(model: nn.Module, height: int, width: int) -> Counter:
    """Count multiply-adds by part; ``total`` is all of them.

    Args:
        model: in evaluation mode; of a SAMDETR, RoIAlign is also counted by itself, as ``roi_align``.
        height, width: of the image, in pixels.
    """
    if not isinstance(model, SetDetector):
        image = 255 * torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
        propose_anchors(model)
        modules = analyze(model, [{"image": image.to(model.device)}])
        parts = {name: modules[f"model.{name}"] for name, _ in model.named_children()}
        return Counter({**parts, "total": modules[""]})
    divisor = max(model.backbone.size_divisibility, 1)
    image = torch.zeros(1, 3, -(-height // divisor) * divisor, -(-width // divisor) * divisor, device=model.device)
    if not isinstance(model, samdetr.SAMDETR):
        modules = analyze(ImageModel(model, (height, width)), (image,))
        return Counter(
            {**{name: modules[f"model.model.{name}"] for name, _ in model.named_children()}, "total": modules[""]}
        )
    modules = analyze(ImageModel(model, (height, width)), (image,))
    # RoIAlign is no module by itself: what the decoder costs without it, behind an encoder that does nothing.
    replaced = {"roi_align": pooled_zeros, "sample_separably": sampled_zeros}
    with (
        mock.patch.object(model.encoder, "forward", lambda levels: levels),
        mock.patch.multiple(semantics_aligner, **replaced),
    ):
        without_roi_align = analyze(ImageModel(model, (height, width)), (image,))
    prefix = "model.model."  # the tracing adapter's and this tool's wrapper
    counts = Counter({part: modules[prefix + part] for part in PARTS})
    for name, flops in modules.items():
        pieces = name.removeprefix(f"{prefix}decoder.").split(".")
        if name.startswith(f"{prefix}decoder.layers.") and len(pieces) == 3:
            counts[f"decoder.{pieces[2]}"] += flops
        elif name.startswith(f"{prefix}decoder.") and pieces[0].endswith("_heads") and len(pieces) == 1:
            counts[f"decoder.{pieces[0]}"] += flops
    counts["roi_align"] = modules[f"{prefix}decoder"] - without_roi_align[f"{prefix}decoder"]
    counts["total"] = modules[""]
    return counts


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count (all, trainable) parameters by part; the statistics of frozen norms are buffers and count in neither."""

    def of(module: nn.Module) -> tuple[int, int]:
        parameters = list(module.parameters())
        return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)

    if not isinstance(model, samdetr.SAMDETR):
        return {**{name: of(child) for name, child in model.named_children()}, "total": of(model)}
    counts = {part: of(getattr(model, part)) for part in PARTS if getattr(model, part) is not None}
    for part in DECODER_PARTS:
        owners = [owner for owner in (*model.decoder.layers, model.decoder) if hasattr(owner, part)]
        if owners:
            counts[f"decoder.{part}"] = of(nn.ModuleList(getattr(owner, part) for owner in owners))
    counts["total"] = of(model)
    return counts


def family_of(cfg) -> str | None:
    """Return which of the paper's rows a config belongs to; None for none."""
    if cfg.MODEL.META_ARCHITECTURE != "SAMDETR" or cfg.MODEL.SAMDETR.ALIGNER.NAME != "SemanticsAligner":
        return None
    if cfg.MODEL.RESNETS.DEPTH != 50 or cfg.MODEL.SAMDETR.HIDDEN_DIM != 256 or cfg.MODEL.SAMDETR.NUM_CLASSES != 80:
        return None
    if len(cfg.MODEL.SAMDETR.IN_FEATURES) == 3:
        return "pp"
    return "DC5" if cfg.MODEL.RESNETS.RES5_DILATION == 2 else "R_50"


# Rows of the paper's Table 1, without the name of their backbone, and the configs that correspond to them here.
NAMES_HERE = {
    "SAM-DETR": "sam_detr{}",
    "SAM-DETR w/ SMCA": "sam_detr_smca{}",
    "SAM-DETR w/ DN": "sam_detr_dn{}",
    "SAM-DETR w/ SMCA + DN": "sam_detr_smca_dn{}",
    "SAM-DETR++": "sam_detr_pp{}",
    "SAM-DETR++ w/ SMCA": "sam_detr_pp_smca{}",
    "SAM-DETR++ w/ SMCA + DN": "sam_detr_pp_smca_dn{}",
    "DETR (300 queries + focal loss)": "baselines/detr{}",
    "Conditional-DETR": "baselines/conditional_detr{}",
    "DAB-DETR": "baselines/dab_detr{}",
    "DN-DETR": "baselines/dn_detr{}",
    "SMCA-DETR": "baselines/smca_detr{}",
    "Deformable-DETR": "baselines/deformable_detr{}",
    "Faster-R-CNN": "baselines/faster_rcnn{}",
    "Cascade-R-CNN": "baselines/cascade_rcnn{}",
    "FCOS": "baselines/fcos{}",
    "Anchor-DETR": "baselines/anchor_detr{}",
    "Sparse-R-CNN": "baselines/sparse_rcnn{}",
}


def config_of_row(row: dict) -> Path | None:
    """Return the config that corresponds to a row of the paper's Table 1; None if there is none."""
    method = row["method"]
    for backbone in ("-R50-FPN", "-R50-DC5", "-R50"):
        method = method.replace(backbone, "")
    name = NAMES_HERE.get(method)
    if name is None:
        return None
    ours = name.startswith("sam_detr") or "detr" in name
    kinds = {"R50": "", "R50-DC5": "_DC5", "R50-MS": "" if ours else "_FPN"}
    if row["backbone"] == "R50" and not ours:
        kinds["R50"] = "_C4"
    if row["backbone"] == "R50-MS" and name.startswith("baselines") and ours:
        name = name.replace("{}", "_pp{}")
    path = config_folder() / f"{name.format('_R_50' + kinds[row['backbone']])}_1x.yaml"
    return path if path.is_file() else None


def print_published(path: Path, size: tuple[int, int]) -> None:
    """Print the paper's table with this project's parameters and multiply-adds beside it."""
    rows = []
    for row in csv.DictReader(path.read_text().splitlines()):
        config = config_of_row(row)
        here = ["", "", "no config here"]
        if config is not None:
            cfg = samdetr.load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
            model = build_detector(cfg).eval()
            flops, parameters = count_flops(model, *size), count_parameters(model)["total"][0]
            name = str(config.relative_to(config_folder()).with_suffix(""))
            here = [f"{parameters / 1e6:.1f}", f"{flops['total'] / 1e9:.0f}", f"`{name}`"]
        paper = [
            row["params_M"],
            row["gflops"],
            row["AP"],
            row["AP50"],
            row["AP75"],
            row["APs"],
            row["APm"],
            row["APl"],
        ]
        rows.append([row["method"], *paper, *here])
        print(f"{row['method']}: done", file=sys.stderr)
    headers = ["method", "params (M)", "GFLOPs", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    headers += ["params (M) here", "GFLOPs here", "config"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def image_sizes(arguments, cfg) -> list[tuple[int, int]]:
    """Return the sizes (height, width) to average over."""
    if not arguments.num_images:
        return [tuple(arguments.size)]
    register_datasets(cfg)
    check_config(cfg, training=False)
    sizes = []
    for inputs in build_test_loader(cfg, cfg.DATASETS.TEST[0]):
        sizes.append(tuple(inputs[0]["image"].shape[1:]))
        if len(sizes) == arguments.num_images:
            break
    return sizes


def giga(number: float) -> str:
    """Return a number in units of 1e9, with more digits where it is small."""
    return f"{number / 1e9:.1f}" if number >= 1e9 else f"{number / 1e9:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config-file", help="a config of this project")
    what.add_argument(
        "--published", type=Path, metavar="CSV", help="the paper's table, to print with figures from here"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--num-images", type=int, default=0, help="average over the first N images of DATASETS.TEST")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options, KEY VALUE")
    arguments = parser.parse_args()
    if arguments.published:
        if arguments.opts or arguments.num_images:
            parser.error("--published takes no other option than --size")
        try:
            return print_published(arguments.published, tuple(arguments.size))
        except (OSError, KeyError) as error:
            raise UserError(
                f"{arguments.published} is not the paper's table ({error}).", argument="published"
            ) from error
    cfg = samdetr.load_config(arguments.config_file, [*arguments.opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    sizes = image_sizes(arguments, cfg)
    model = build_detector(cfg).eval()
    parameters = count_parameters(model)
    flops: Counter = Counter()
    for size, times in Counter(sizes).items():
        for part, count in count_flops(model, *size).items():
            flops[part] += count * times / len(sizes)

    def row(label: str, part: str) -> list:
        total, trainable = parameters.get(part, (0, 0))
        return [label, f"{total / 1e6:.2f}", f"{trainable / 1e6:.2f}", giga(flops[part])]

    if isinstance(model, samdetr.SAMDETR):
        rows = [row(label, part) for part, label in PARTS.items() if part in parameters]
        pieces = [part for part in DECODER_PARTS if f"decoder.{part}" in parameters]
        rows += [row(f"  of it {part.replace('_', ' ')}", f"decoder.{part}") for part in pieces]
        rows.append(["  of it RoIAlign", "", "", giga(flops["roi_align"])])
        rows.append(row("total", "total"))
        rows.append(["total without RoIAlign", "", "", giga(flops["total"] - flops["roi_align"])])
    else:
        rows = [row(part, part) for part in parameters]
    family = family_of(cfg)
    if family:
        rows.append(["the paper's Table 1", PAPER[family][0], "", PAPER[family][1]])
    print(
        tabulate(
            rows, headers=["part", "params (M)", "trainable (M)", "GFLOPs"], disable_numparse=True, stralign="left"
        )
    )
    where = f"{sizes[0][0]} x {sizes[0][1]}" if not arguments.num_images else f"mean over {len(sizes)} images"
    print(f"\nGFLOPs: {where}; fvcore, a multiply-add counts once. Those of the paper are means over COCO images.")


if __name__ == "__main__":
    run(main)
