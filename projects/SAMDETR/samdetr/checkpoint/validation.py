"""Check whether weights fit a model: before they are loaded, and of a pretrained backbone afterwards."""

import logging
import re
from collections.abc import Collection, Iterable

import numpy as np
import torch

from ..errors import UserError

__all__ = ["check_backbone", "check_fit", "class_parameters"]

logger = logging.getLogger(__name__)

# Parameters whose first dimension follows from the number of classes; the last two lines are those of detectron2's detectors.
_CLASS_PARAMETERS = re.compile(
    r"(.+\.)?(class_head|class_heads\.\d+)\.(\d+\.)?(weight|bias)|query_generator\.label_embedding\.weight"
    r"|roi_heads\.box_predictor\.(\d+\.)?(cls_score|bbox_pred)\.(weight|bias)"
    r"|head\.cls_score\.(weight|bias)"
)


def class_parameters(names: Iterable[str]) -> list[str]:
    """Return those of the parameters that depend on the number of classes, sorted."""
    return sorted(name for name in names if _CLASS_PARAMETERS.fullmatch(name))


# What a checkpoint may have beyond the model that is to predict with it: nothing of this changes a box.
_NOT_NEEDED = re.compile(
    r"^dense_head\.|^pixel_(mean|std)$|anchor_generator\.|(mask|keypoint)_head\.|\.num_batches_tracked$"
)


def check_fit(path: str, model: torch.nn.Module, weights: dict, *, complete: bool) -> None:
    """Check that weights fit a model.

    Args:
        path: of the checkpoint, for the message.
        model: the model.
        weights: by name, in this project's names.
        complete: whether every parameter must be among them, and nothing else that predictions depend on (evaluation).
            Otherwise they may be a part of the model, such as its backbone, or have further parts, and be of another number of
            classes; but whatever they have of the model must fit.

    Raises:
        UserError: they do not fit.
    """
    foreign = [name for name, value in weights.items() if not hasattr(value, "shape")]
    if foreign:
        raise UserError(
            f"{path} is not a checkpoint of this project: beside tensors it has the entries {', '.join(foreign[:5])}. It "
            'needs an entry "model" with the parameters. The authors\' files have to be converted first, see docs/models.md.'
        )
    own = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes = {name.removeprefix("module."): tuple(value.shape) for name, value in weights.items()}
    fitting = {name for name, shape in own.items() if shapes.get(name) == shape}
    wrong = [name for name in own if name not in fitting and (complete or name in shapes)]
    if not complete:
        reset = class_parameters(wrong)
        wrong = [name for name in wrong if name not in reset or shapes[name][1:] != own[name][1:]]
    unused = [name for name in shapes if name not in own and not _NOT_NEEDED.search(name)]
    if complete and unused and not wrong:
        raise UserError(
            f"{path} is of another architecture than the config: {len(unused)} of its parameters are not in the model, such as "
            f"{unused[0]}. Use the config that the checkpoint was trained with (config.yaml beside it)."
        )
    if wrong:
        name = next((name for name in wrong if name in shapes), wrong[0])
        found = f"has shape {shapes[name]} in the file" if name in shapes else "is not in the file"
        raise UserError(
            f"{path} is of another architecture than the config: {len(wrong)} of {len(own)} parameters do "
            f"not fit; {name}, of shape {own[name]} in the model, {found}. Use the config that the checkpoint was trained "
            "with (config.yaml beside it)."
        )
    damaged = next((name for name in own if name in fitting and not _is_finite(weights, name)), None)
    if damaged is not None:
        raise UserError(
            f"{path} has values that are not finite in {damaged}: its training has gone wrong. Name an earlier checkpoint."
        )
    if not fitting:
        raise UserError(
            f"{path} has no parameter that fits this model: its first is {next(iter(shapes), None)!r}, the "
            f"model's {next(iter(own))!r}."
        )


def check_backbone(path: str, model: torch.nn.Module, missing: Collection[str]) -> None:
    """Check what a model has got from a file of detectron2's model zoo, and log what of its backbone was not there.

    Args:
        path: of the file, for the message.
        model: the model, into which the file was loaded by detectron2's matching of names.
        missing: names of the model's parameters and buffers that the file does not have, or in other shapes.

    Raises:
        UserError: nothing of the backbone was there, or values that are not finite.
    """
    added = (".fpn_", ".top_block.")  # by an FPN, which no classifier has
    own = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith("backbone.") and value.is_floating_point() and not any(part in name for part in added)
    }
    lacking = sorted(own.keys() & missing)
    if own and len(lacking) == len(own):
        raise UserError(
            f"MODEL.WEIGHTS {path} has none of this model's backbone: name weights of the network that MODEL.BACKBONE and "
            "MODEL.RESNETS describe, or MODEL.WEIGHTS '' to start from random ones."
        )
    if lacking:
        logger.warning(
            "%s has %d of the backbone's %d arrays in no usable shape or not at all, such as %s: they start from scratch.",
            *(path, len(lacking), len(own), lacking[0]),
        )
    damaged = next((name for name in own if not _is_finite(own, name)), None)
    if damaged is not None:
        raise UserError(
            f"MODEL.WEIGHTS {path} has values for {damaged} that are not finite: copy it again, or name another file."
        )


def _is_finite(weights: dict, name: str) -> bool:
    value = weights[name] if name in weights else weights[f"module.{name}"]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    return not (torch.is_floating_point(value) and not value.is_meta) or bool(value.isfinite().all())
