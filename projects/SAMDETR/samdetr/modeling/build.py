"""Build the model that a config describes."""

import traceback
from pathlib import Path

from detectron2.modeling import build_model
from torch import nn

from ..errors import UserError

__all__ = ["build_detector"]


def build_detector(cfg) -> nn.Module:
    """Build the model that ``cfg.MODEL.META_ARCHITECTURE`` names, with detectron2's ``build_model``.

    Raises:
        UserError: its parts do not fit together; the message says where that was found.
    """
    try:
        return build_model(cfg)
    except UserError:
        raise
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"The model cannot be built from the MODEL keys of the config ({type(error).__name__}: {error}, in "
            f"{Path(place.filename).name}, line {place.lineno}): correct them, or start from one of the shipped configs."
        ) from error
