"""Loading checkpoints with checks, and the authors' published checkpoints in this project's names.

The published single-scale and multi-scale models name their parts alike; what differs is told by shapes.
"""

import contextlib
import logging
import os
import re
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from .checks import check_loaded, check_weights_file, class_parameters
from .errors import UserError

__all__ = ["CheckedCheckpointer", "convert_published_state_dict"]

logger = logging.getLogger(__name__)


class CheckedCheckpointer(DetectionCheckpointer):
    """detectron2's, which writes a file whole or not at all, and refuses a checkpoint that does not fit the model.

    A model that is initialised from a checkpoint with another number of classes starts its class heads and its label
    embedding anew, and the log says so. A run whose last checkpoint is damaged is resumed from the one before.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *args,
        complete: bool,
        use_average: bool = False,
        description: dict[str, Any] | None = None,
        **kwargs,
    ):
        """
        Args:
            model, args, kwargs: see :class:`detectron2.checkpoint.DetectionCheckpointer`.
            complete: whether every parameter must come from the checkpoint (evaluation and resuming), or any will do
                (initialisation).
            use_average: whether to load the moving average of the weights, if the checkpoint has one.
            description: what every saved checkpoint carries beside the weights, see
                :func:`samdetr.predictor.self_description`.
        """
        super().__init__(model, *args, **kwargs)
        self.description = description or {}
        self.complete = complete
        self.use_average = use_average
        self._path = ""

    def save(self, name: str, *, tag: bool = True, **extra) -> None:
        """Write ``name.pth``.

        Args:
            name: of the file, without its ending.
            tag: whether to mark it as the last checkpoint, which resuming starts from.
            extra: what else to save.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **parts, **self.description}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with _written_whole(path) as f:
            torch.save({**data, **extra}, f)
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with _written_whole(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def has_checkpoint(self) -> bool:
        return bool(self._resumable_files())

    def get_checkpoint_file(self) -> str:
        """The newest checkpoint of a run in ``save_dir`` that can be read; empty if there is none.

        Raises:
            UserError: there are checkpoints, but none can be read.
        """
        files = self._resumable_files()
        for path in files:
            try:
                check_weights_file(path, given_as="the checkpoint")
            except UserError as error:
                logger.error("%s Trying the checkpoint before it.", error)
                continue
            logger.info("Resuming from %s.", path)
            return path
        if files:
            raise UserError(f"None of the checkpoints in {self.save_dir} can be read: {', '.join(files)}.")
        return ""

    def _resumable_files(self) -> list[str]:
        """Checkpoints of a run, the one marked as last first, then from the newest to the oldest."""
        if not os.path.isdir(self.save_dir):
            return []
        files = [
            os.path.join(self.save_dir, name)
            for name in os.listdir(self.save_dir)
            if re.fullmatch(r"model_(\d+|final)\.pth", name)
        ]
        files.sort(key=os.path.getmtime, reverse=True)
        marked = super().get_checkpoint_file()
        return sorted(files, key=lambda path: path != marked)

    def _load_file(self, filename: str) -> dict:
        loaded = super()._load_file(filename)
        if self.use_average and "average" in loaded:
            logger.info("Using the moving average of the weights in %s.", filename)
            average = loaded["average"].items()
            loaded["model"] = {k.removeprefix("module."): v for k, v in average if k.startswith("module.")}
        elif self.use_average:
            logger.warning("%s holds no moving average of the weights: using its weights.", filename)
        return loaded

    def load(self, path: str, *args, **kwargs) -> dict:
        self._path = path
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: dict):
        if not checkpoint.get("matching_heuristics", False):
            check_loaded(self._path, self.model, checkpoint["model"], complete=self.complete)
        elif self.complete:
            raise UserError(
                f"{self._path} holds a pretrained backbone, not a trained detector: name a checkpoint of this model in "
                "MODEL.WEIGHTS."
            )
        incompatible = super()._load_model(checkpoint)
        anew = class_parameters(name for name, *_ in incompatible.incorrect_shapes)
        if anew:
            logger.warning("%s was trained with another number of classes: %s start anew.", self._path, ", ".join(anew))
        return incompatible


# Published parts of a layer, and this project's.
_ENCODER_LAYER = {
    "self_attn.value_proj": "self_attention.value",
    "self_attn.output_proj": "self_attention.output",
    "self_attn": "self_attention",  # what else it has is named alike
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
    r"backbone\.0\.body\.conv1\.(\w+)": r"backbone.stem.conv1.\1",
    r"backbone\.0\.body\.bn1\.(\w+)": r"backbone.stem.conv1.norm.\1",
    r"input_proj\.(\d+)\.0\.(\w+)": r"feature_projection.projections.\1.\2",
    r"input_proj\.(\d+)\.1\.(\w+)": r"feature_projection.norms.\1.\2",
    r"transformer\.level_embed": r"feature_projection.level_embedding",
    r"query_embed\.weight": r"query_generator.reference_logits",
    r"class_embed\.(\d+)\.(\w+)": r"decoder.class_heads.\1.\2",
    r"bbox_embed\.(\d+)\.(layers\..+)": r"decoder.box_heads.\1.\2",
}


def _rename(name: str) -> str | None:
    """This project's name of a published parameter, or None if there is none."""
    if match := re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(.+)", name):
        part, layer, rest = match.groups()
        for old, new in (_ENCODER_LAYER if part == "encoder" else _DECODER_LAYER).items():
            if rest.startswith(f"{old}."):
                return f"{part}.layers.{layer}.{new}{rest.removeprefix(old)}"
        return None
    if match := re.fullmatch(r"backbone\.0\.body\.layer(\d)\.(\d+)\.(.+)", name):
        stage, block, rest = match.groups()
        rest = re.sub(r"^bn(\d)", r"conv\1.norm", rest)
        rest = rest.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        return f"backbone.res{int(stage) + 1}.{block}.{rest}"
    for pattern, replacement in _OTHERS.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


@contextlib.contextmanager
def _written_whole(path: str):
    """Open a file for writing that appears under its name only when all of it is on the disk."""
    temporary = f"{path}.part"
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


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
