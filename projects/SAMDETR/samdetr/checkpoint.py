"""The authors' published checkpoints, in this project's names.

The published single-scale and multi-scale models name their parts alike; what differs is told by shapes.
"""

import re

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

__all__ = ["convert_published_state_dict"]

# Published name -> this project's, first match wins; a replacement of None leaves the parameter out.
_RULES: list[tuple[str, str | None]] = [
    # The backbone: torchvision's names to detectron2's.
    (r"backbone\.0\.body\.conv1\.weight", r"backbone.stem.conv1.weight"),
    (r"backbone\.0\.body\.bn1\.(\w+)", r"backbone.stem.conv1.norm.\1"),
    (r"backbone\.0\.body\.layer(\d)\.(\d+)\.conv(\d)\.weight", r"backbone.res{layer}.\2.conv\3.weight"),
    (r"backbone\.0\.body\.layer(\d)\.(\d+)\.bn(\d)\.(\w+)", r"backbone.res{layer}.\2.conv\3.norm.\4"),
    (r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.0\.weight", r"backbone.res{layer}.\2.shortcut.weight"),
    (r"backbone\.0\.body\.layer(\d)\.(\d+)\.downsample\.1\.(\w+)", r"backbone.res{layer}.\2.shortcut.norm.\3"),
    # Input projections and queries.
    (r"input_proj\.(\d+)\.0\.(\w+)", r"feature_projection.projections.\1.\2"),
    (r"input_proj\.(\d+)\.1\.(\w+)", r"feature_projection.norms.\1.\2"),
    (r"transformer\.level_embed", r"feature_projection.level_embedding"),
    (r"query_embed\.weight", r"query_generator.reference_logits"),
    # The encoders: multi-head attention, or deformable attention.
    (
        r"transformer\.encoder\.layers\.(\d+)\.self_attn\.((?:in_proj_|out_proj\.|sampling_offsets\.|attention_weights\.)\w+)",
        r"encoder.layers.\1.self_attention.\2",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.value_proj\.(\w+)", r"encoder.layers.\1.self_attention.value.\2"),
    (
        r"transformer\.encoder\.layers\.(\d+)\.self_attn\.output_proj\.(\w+)",
        r"encoder.layers.\1.self_attention.output.\2",
    ),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(\w+)", r"encoder.layers.\1.norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(\w+)", r"encoder.layers.\1.feedforward.norm.\2"),
    (r"transformer\.(en|de)coder\.layers\.(\d+)\.linear1\.(\w+)", r"\1coder.layers.\2.feedforward.mlp.layers.0.\3"),
    (r"transformer\.(en|de)coder\.layers\.(\d+)\.linear2\.(\w+)", r"\1coder.layers.\2.feedforward.mlp.layers.1.\3"),
    # The decoder's self-attention.
    (r"transformer\.decoder\.layers\.(\d+)\.sa_qcontent_proj\.(\w+)", r"decoder.layers.\1.self_attention.query_content.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.sa_qpos_proj\.(\w+)", r"decoder.layers.\1.self_attention.query_position.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.sa_kcontent_proj\.(\w+)", r"decoder.layers.\1.self_attention.key_content.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.sa_kpos_proj\.(\w+)", r"decoder.layers.\1.self_attention.key_position.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.sa_v_proj\.(\w+)", r"decoder.layers.\1.self_attention.value.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"decoder.layers.\1.self_attention.output.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm1\.(\w+)", r"decoder.layers.\1.self_attention_norm.\2"),
    # The Semantics Aligner.
    (r"transformer\.decoder\.layers\.(\d+)\.point1\.0\.(\w+)", r"decoder.layers.\1.aligner.reduction.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.point2\.0\.(\w+)", r"decoder.layers.\1.aligner.keypoint_head.layers.0.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.point2\.2\.(\w+)", r"decoder.layers.\1.aligner.keypoint_head.layers.1.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.point2\.4\.(\w+)", r"decoder.layers.\1.aligner.keypoint_head.layers.2.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.point2\.6\.(\w+)", r"decoder.layers.\1.aligner.keypoint_head.layers.3.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.attn1\.(\w+)", r"decoder.layers.\1.aligner.content_gate.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.attn2\.(\w+)", r"decoder.layers.\1.aligner.position_gate.\2"),
    # The decoder's cross-attention.
    (r"transformer\.decoder\.layers\.(\d+)\.ca_qcontent_proj\.(\w+)", r"decoder.layers.\1.cross_attention.query_content.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_qpos_sine_proj\.(.+)", r"decoder.layers.\1.cross_attention.query_position.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_kcontent_proj\.(\w+)", r"decoder.layers.\1.cross_attention.key_content.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_kpos_sine_proj\.(.+)", r"decoder.layers.\1.cross_attention.key_position.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.ca_v_proj\.(\w+)", r"decoder.layers.\1.cross_attention.value.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.cross_attn\.out_proj\.(\w+)", r"decoder.layers.\1.cross_attention.output.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm2\.(\w+)", r"decoder.layers.\1.cross_attention_norm.\2"),
    (r"transformer\.decoder\.layers\.(\d+)\.norm3\.(\w+)", r"decoder.layers.\1.feedforward.norm.\2"),
    # Heads. The published decoder holds the box heads a second time.
    (r"transformer\.decoder\.bbox_embed\..+", None),
    (r"class_embed\.(\d+)\.(\w+)", r"decoder.class_heads.\1.\2"),
    (r"bbox_embed\.(\d+)\.(layers\..+)", r"decoder.box_heads.\1.\2"),
]


def _rename(name: str) -> str | None:
    for pattern, replacement in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            if replacement is None:
                return None
            new = match.expand(replacement.replace("{layer}", "LAYER"))
            return new.replace("LAYER", str(int(match.group(1)) + 1)) if "LAYER" in new else new
    raise KeyError(name)


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
        try:
            new_name = _rename(name)
        except KeyError:
            unknown.append(name)
            continue
        if new_name is None:
            continue
        value = torch.as_tensor(value)
        if value.dim() == 4 and not new_name.startswith("backbone."):
            value = value.flatten(1)  # a 1x1 convolution is a linear layer on channels-last maps
        if new_name.startswith("decoder.class_heads."):
            value = _select_classes(value, num_classes)
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


def _select_classes(value: Tensor, num_classes: int) -> Tensor:
    """Rows of a classifier's weight or bias for ``num_classes`` classes."""
    if len(value) == num_classes:
        return value
    if len(value) == 91 and num_classes == 80:
        return value[[category["id"] for category in COCO_CATEGORIES if category["isthing"]]]
    raise ValueError(
        f"The classifier has {len(value)} outputs and cannot be converted to {num_classes} classes: only 91 (COCO's own "
        "category ids) to 80 is known."
    )
