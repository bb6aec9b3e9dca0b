"""The authors' published checkpoints: their parameters under this project's names, and the config that fits.

The published single-scale and multi-scale models share their parameter names; their shapes tell the variants apart.
"""

import re
from typing import Any

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

__all__ = ["convert_published_state_dict", "recognize_published", "rename_resnet", "select_classes"]

# Names of the published parts of a layer, and of this project's.
_ENCODER_LAYER = {
    "self_attn.value_proj": "self_attention.value",
    "self_attn.output_proj": "self_attention.output",
    "self_attn": "self_attention",  # its other parameters keep their names
    "norm1": "norm",
    "linear1": "feedforward.mlp.layers.0",
    "linear2": "feedforward.mlp.layers.1",
    "norm2": "feedforward.norm",
}
_DECODER_LAYER = {
    "sa_qcontent_proj": "self_attention.query_content",
    "sa_qpos_proj": "self_attention.query_position",
    "sa_kcontent_proj": "self_attention.key_content",
    "sa_kpos_proj": "self_attention.key_position",
    "sa_v_proj": "self_attention.value",
    "self_attn.out_proj": "self_attention.output",
    "norm1": "self_attention_norm",
    "point1.0": "aligner.reduction",
    "point2.0": "aligner.keypoint_head.layers.0",
    "point2.2": "aligner.keypoint_head.layers.1",
    "point2.4": "aligner.keypoint_head.layers.2",
    "point2.6": "aligner.keypoint_head.layers.3",
    "attn1": "aligner.content_gate",
    "attn2": "aligner.position_gate",
    "ca_qcontent_proj": "cross_attention.query_content",
    "ca_qpos_sine_proj": "cross_attention.query_position",
    "ca_kcontent_proj": "cross_attention.key_content",
    "ca_kpos_sine_proj": "cross_attention.key_position",
    "ca_v_proj": "cross_attention.value",
    "cross_attn.out_proj": "cross_attention.output",
    "norm2": "cross_attention_norm",
    "linear1": "feedforward.mlp.layers.0",
    "linear2": "feedforward.mlp.layers.1",
    "norm3": "feedforward.norm",
}
# Everything outside the layers, as regular expressions.
_OTHERS = {
    r"input_proj\.(\d+)\.0\.(\w+)": r"feature_projection.projections.\1.\2",
    r"input_proj\.(\d+)\.1\.(\w+)": r"feature_projection.norms.\1.\2",
    r"transformer\.level_embed": r"feature_projection.level_embedding",
    r"query_embed\.weight": r"query_generator.reference_logits",
    r"class_embed\.(\d+)\.(\w+)": r"decoder.class_heads.\1.\2",
    r"bbox_embed\.(\d+)\.(layers\..+)": r"decoder.box_heads.\1.\2",
}


def _rename(name: str) -> str | None:
    """Return this project's name of a published parameter; None if there is none."""
    if match := re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)", name):
        part, layer, rest = match.groups()
        for old, new in (_ENCODER_LAYER if part == "encoder" else _DECODER_LAYER).items():
            if rest.startswith(f"{old}."):
                return f"{part}.layers.{layer}.{new}{rest.removeprefix(old)}"
        return None
    if name.startswith("backbone.0.body."):
        return rename_resnet(name.removeprefix("backbone.0.body."))
    for pattern, replacement in _OTHERS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def rename_resnet(name: str) -> str | None:
    """Return this project's name of a parameter of torchvision's ResNet, such as "layer1.0.conv1.weight"; None if there is
    none."""
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"backbone.stem.conv1.{'norm.' if match[1] == 'bn' else ''}{match[2]}"
    if match := re.fullmatch(r"layer(\d)\.(\d+)\.(.+)", name):
        stage, block, rest = match.groups()
        rest = re.sub(r"^bn(\d)", r"conv\1.norm", rest)
        rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        return f"backbone.res{int(stage) + 1}.{block}.{rest}"
    return None


def convert_published_state_dict(state_dict: dict[str, Tensor], num_classes: int = 80) -> dict[str, Tensor]:
    """Rename the parameters of the authors' model, and reorder those that this project stores in another order.

    Args:
        state_dict: the ``model`` entry of a published checkpoint.
        num_classes: classes of the converted model. A published classifier of 91 outputs, indexed by COCO's own category
            ids, becomes one of 80 in detectron2's order of contiguous ids, or stays as it is with ``num_classes=91``.

    Returns:
        A new dict with this project's names; tensors may share memory with the given ones.

    Raises:
        ValueError: a parameter is not one of SAM-DETR's, or the classifier cannot give ``num_classes``.
    """
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, value in state_dict.items():
        if name.startswith("transformer.decoder.bbox_embed."):
            continue  # the published decoder holds the box heads a second time
        new_name = _rename(name)
        if new_name is None:
            unknown.append(name)
            continue
        value = torch.as_tensor(value)
        if value.dim() == 4 and not new_name.startswith("backbone."):
            value = value.flatten(1)  # a 1x1 convolution is a linear layer here, on channels-last maps
        if new_name.startswith("decoder.class_heads."):
            value = select_classes(value, num_classes)
        converted[new_name] = value
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(state_dict)} parameters are not those of a published SAM-DETR model, for example "
            f"{unknown[0]!r}."
        )
    for name in [name for name in converted if name.endswith("aligner.keypoint_head.layers.0.weight")]:
        channels = len(converted[name.replace("keypoint_head.layers.0.weight", "reduction.weight")])
        # Published: pooled features flattened as (channels, y, x); here: (y, x, channels).
        converted[name] = converted[name].unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)
    return converted


def select_classes(value: Tensor, num_classes: int) -> Tensor:
    """Select the rows of a classifier's weight or bias for ``num_classes`` classes."""
    if len(value) == num_classes:
        return value
    if len(value) == 91 and num_classes == 80:
        return value[[category["id"] for category in COCO_CATEGORIES if category["isthing"]]]
    raise ValueError(
        f"The classifier has {len(value)} outputs and cannot be converted to {num_classes} classes: only 91 (COCO's own "
        "category ids) to 80 is known."
    )


def recognize_published(state_dict: dict[str, Tensor], checkpoint: dict[str, Any], file_name: str) -> tuple[str, str]:
    """Name the config that fits a published state dict.

    The weights determine everything except DC5 (which has no weights of its own) and, where both schedules share an
    architecture, the schedule. These come from the checkpoint's own arguments and epoch if it has them, else from the name
    of its file.

    Args:
        state_dict: the ``model`` entry of the checkpoint, in the authors' names.
        checkpoint: the whole checkpoint.
        file_name: name of its file.

    Returns:
        The config's name, and how it was determined.

    Raises:
        KeyError: the state dict lacks a parameter of SAM-DETR's.
    """
    multi_scale = "transformer.level_embed" in state_dict
    num_values = len(state_dict["transformer.decoder.layers.0.point2.6.bias"])
    heads = len(state_dict["transformer.decoder.layers.0.attn1.bias"]) // state_dict["input_proj.0.0.weight"].shape[0]
    smca = num_values == 4 * heads
    lower = file_name.lower()
    arguments = checkpoint.get("args")
    source = "names and shapes"
    dc5 = False
    if not multi_scale:
        dilation = getattr(arguments, "dilation", None)
        if dilation is not None:
            dc5, source = bool(dilation), f"{source}; DC5 by the checkpoint's arguments"
        else:
            dc5, source = "dc5" in lower, f"{source}; DC5 by the file's name, since the weights do not tell"
        fifty = "input_proj.0.1.weight" not in state_dict
    elif "epoch" in checkpoint:
        fifty, source = checkpoint["epoch"] >= 12, f"{source}; the schedule by the checkpoint's epoch"
    else:
        fifty, source = "50" in re.sub(r"r_?50", "", lower), f"{source}; the schedule by the file's name"
    parts = ["sam_detr", "pp" if multi_scale else "", "smca" if smca else "", "R_50", "DC5" if dc5 else ""]
    return "_".join(part for part in parts if part) + ("_50ep" if fifty else "_1x"), source
