"""Weights of ``transformers``' DETRs, under this project's names: of its models' state dicts, and of the files on its hub.

Known are ``DetrForObjectDetection``, ``ConditionalDetrForObjectDetection``, ``DabDetrForObjectDetection`` and
``DeformableDetrForObjectDetection`` (without box refinement), over a ResNet of timm's or of ``transformers``' own.
"""

import logging
import re

from torch import Tensor

from .published import rename_resnet, select_classes

__all__ = ["convert_transformers_state_dict", "is_transformers_state_dict"]

logger = logging.getLogger(__name__)

_BACKBONE = r"model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?(.+)"
# Names of transformers' ResNet, and of torchvision's and timm's.
_RESNET = {
    r"embedder\.embedder\.convolution\.(\w+)": r"conv1.\1",
    r"embedder\.embedder\.normalization\.(\w+)": r"bn1.\1",
}
# Of older files, such as those on the hub, and of transformers since its version 5. DAB-DETR's names have not changed.
_OLDER = {
    r"((?:encoder|decoder)\.layers\.\d+)\.(fc[12])\.": r"\1.mlp.\2.",
    r"(self_attn|encoder_attn)\.out_proj\.": r"\1.o_proj.",
    r"(decoder\.layers\.\d+)\.sa_(q|k)(content|pos)_proj\.": r"\1.self_attn.\2_\3_proj.",
    r"(decoder\.layers\.\d+)\.sa_v_proj\.": r"\1.self_attn.v_proj.",
    r"(decoder\.layers\.\d+)\.ca_(q|k)(content|pos)_proj\.": r"\1.encoder_attn.\2_\3_proj.",
    r"(decoder\.layers\.\d+)\.ca_v_proj\.": r"\1.encoder_attn.v_proj.",
    r"(decoder\.layers\.\d+)\.ca_qpos_sine_proj\.": r"\1.encoder_attn.q_pos_sine_proj.",
}
_HEADS = {
    r"(?:class_labels_classifier|class_embed)\.(weight|bias)": r"class_head.\1",
    r"class_embed\.0\.(weight|bias)": r"class_head.\1",
    r"bbox_predictor\.(layers\..+)": r"box_head.\1",
    r"bbox_embed\.0\.(layers\..+)": r"box_head.\1",
}
# What is in the state dict a second time: the heads of further layers, which are the first one's.
_REPEATED = r"(class_embed|bbox_embed)\.[1-9]\d*\..+|model\.decoder\.bbox_embed\.layers\..+"


def is_transformers_state_dict(names) -> bool:
    """Return whether parameters of these names are those of one of ``transformers``' DETRs."""
    names = list(names)
    detector = any(re.match(r"model\.(encoder|decoder)\.layers\.0\.", name) for name in names)
    return detector and any(re.match(_BACKBONE, name) for name in names)


def convert_transformers_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the parameters.

    Args:
        state_dict: by the names that ``transformers`` gives them. DETR's classifier has one more output, for no object, which
            is left out, because focal loss has none. A classifier that then has 91 outputs, indexed by COCO's own category
            ids, becomes one of 80 in detectron2's order.

    Returns:
        A new dict with this project's names; tensors may share memory with the given ones.

    Raises:
        ValueError: a parameter is not one of these detectors'.
    """
    softmax = "class_labels_classifier.bias" in state_dict and not any("query_scale" in name for name in state_dict)
    if softmax:
        logger.warning(
            "The weights are those of a DETR with softmax loss. Its output for no object is left out, and its scores are "
            "sigmoids here, so that they mean little before it has been trained on."
        )
    if _refines_boxes(state_dict):
        raise ValueError("These are the weights of a Deformable DETR with box refinement, which is not here.")
    renamed_since = "model.query_refpoint_embeddings.weight" not in state_dict
    converted = {}
    for name, value in state_dict.items():
        if name.endswith("num_batches_tracked") or re.fullmatch(_REPEATED, name):
            continue
        new_name = _rename(name, renamed_since)
        if new_name is None:
            raise ValueError(f"The parameter {name!r} is not one of a DETR of transformers that is known here.")
        if new_name.startswith("class_head."):
            value = value[: len(value) - softmax]
            value = select_classes(value, 80) if len(value) == 91 else value
        converted[new_name] = value
    return converted


def _refines_boxes(state_dict: dict[str, Tensor]) -> bool:
    """Return whether the layers of a Deformable DETR have heads of their own."""
    heads = [value for name, value in state_dict.items() if re.fullmatch(r"class_embed\.\d+\.bias", name)]
    own = any(not value.equal(heads[0]) for value in heads)
    return own or any(name.startswith("model.decoder.bbox_embed.0.") for name in state_dict)


def _rename(name: str, renamed_since: bool) -> str | None:
    """Return this project's name of a parameter; None if there is none."""
    for pattern, replacement in _HEADS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    if match := re.fullmatch(_BACKBONE, name):
        return rename_resnet(_torchvision_name(match[1]))
    if not name.startswith("model."):
        return None
    for pattern, replacement in _OLDER.items() if renamed_since else ():
        name = re.sub(pattern, replacement, name)
    return f"network.{name.removeprefix('model.')}"


def _torchvision_name(name: str) -> str:
    """Return torchvision's name of a parameter of ``transformers``' ResNet; others stay as they are."""
    for pattern, replacement in _RESNET.items():
        name = re.sub(pattern, replacement, name)
    if match := re.fullmatch(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(shortcut|layer\.\d+)\.(\w+)\.(\w+)", name):
        stage, block, part, kind, rest = match.groups()
        conv = kind == "convolution"
        if part == "shortcut":
            part = f"downsample.{0 if conv else 1}"
        else:
            part = f"{'conv' if conv else 'bn'}{int(part.removeprefix('layer.')) + 1}"
        return f"layer{int(stage) + 1}.{block}.{part}.{rest}"
    return name
