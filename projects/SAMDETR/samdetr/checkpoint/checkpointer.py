"""Save and load a model during a run, with detectron2's checkpointer."""

import contextlib
import logging
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import UserError, one_line
from .checkpoint import Checkpoint, write_atomically
from .validation import check_backbone, check_fit, class_parameters

__all__ = ["CheckedCheckpointer"]

logger = logging.getLogger(__name__)


class CheckedCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, with checks.

    It writes a file whole or not at all, and refuses a checkpoint that does not fit the model. If a model is initialised from
    a checkpoint with another number of classes, its class heads and label embedding start from scratch; with the same number
    of other classes they are kept. The log says so.
    A run whose last checkpoint is damaged resumes from the one before.
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
            complete: whether every parameter must come from the checkpoint (evaluation and resuming), or any subset will do
                (initialisation).
            use_average: whether to load the moving average of the weights, if the checkpoint has one. To initialise a model,
                it is taken in any case, because it is what was evaluated.
            description: what every saved checkpoint carries beside the weights, see :func:`describe_run`.
        """
        super().__init__(model, *args, **kwargs)
        self.description = description or {}
        self.complete = complete
        self.use_average = use_average
        self._source: str | Checkpoint = ""

    def save(self, name: str, *, tag: bool = True, **extra) -> None:
        """Write ``name.pth``.

        Args:
            name: of the file, without its ending.
            tag: whether to mark it as the last checkpoint, which resuming starts from.
            extra: further entries.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        Checkpoint({"model": self.model.state_dict(), **parts, **self.description, **extra}).write(path)
        if tag:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_atomically(os.path.join(self.save_dir, "last_checkpoint")) as f:
            f.write(last_filename_basename.encode())

    def read_last(self) -> Checkpoint | None:
        """Read the newest checkpoint of a run in ``save_dir`` that is not damaged; None if there is no checkpoint.

        Raises:
            UserError: there are checkpoints, but all of them are damaged.
        """
        files = self._resumable_files()
        for path in files:
            try:
                checkpoint = Checkpoint.read(path, name="The checkpoint")
            except UserError as error:
                logger.error("%s Trying the checkpoint before it.", error)
                continue
            logger.info("Resuming from %s.", path)
            return checkpoint
        if files:
            raise UserError(f"None of the checkpoints in {self.save_dir} can be read: {', '.join(files)}.")
        return None

    def _resumable_files(self) -> list[str]:
        """Return the checkpoints of a run: the one marked as last first, then from the latest iteration to the earliest."""
        if not os.path.isdir(self.save_dir):
            return []
        iterations: dict[str, float] = {}
        for name in os.listdir(self.save_dir):
            if match := re.fullmatch(r"model_(\d+|final)\.pth", name):
                path = os.path.join(self.save_dir, name)
                iterations[path] = _iteration_of(path) if match[1] == "final" else int(match[1])
        marked = None
        with contextlib.suppress(OSError, ValueError):  # it may be missing or damaged
            marked = os.path.join(self.save_dir, Path(self.save_dir, "last_checkpoint").read_text("utf-8").strip())
        return sorted(iterations, key=lambda path: (path != marked, -iterations[path]))

    def load(self, source: str | Checkpoint, *args, **kwargs) -> dict:
        """Load a checkpoint that has been read already, or a file or address that detectron2 knows.

        Args:
            source: the checkpoint.
            args, kwargs: see :meth:`fvcore.common.checkpoint.Checkpointer.load`.

        Returns:
            The entries that were not loaded.

        Raises:
            UserError: the checkpoint cannot be read, or does not fit the model.
            ValueError: the checkpoint was made in memory and not read from a file.
        """
        if isinstance(source, Checkpoint) and not source.path:
            raise ValueError("Only a checkpoint that was read from a file can be loaded: write it first.")
        self._source = source
        try:
            return super().load(self._path, *args, **kwargs)
        except UserError:
            raise
        except OSError as error:
            if "://" not in self._path:
                raise
            raise UserError(
                f"MODEL.WEIGHTS {self._path} cannot be downloaded ({one_line(error)}): correct the address, or name a file on "
                "this machine."
            ) from error
        except Exception as error:  # states of other programs, and damaged ones, fail wherever they are used
            raise UserError(
                f"{self._path} cannot be loaded ({type(error).__name__}: {error}): it is damaged, or of another program or "
                "version. Name another file, or start from its weights alone in a new OUTPUT_DIR."
            ) from error
        finally:
            self._source = ""  # its weights need not stay in memory

    @property
    def _path(self) -> str:
        return self._source.path if isinstance(self._source, Checkpoint) else self._source

    def _load_file(self, f: str) -> dict:
        # detectron2 would unpickle whatever a .pkl file holds; its other formats are those of torch.
        return self._torch_load(f) if f.endswith(".pkl") else super()._load_file(f)

    def _torch_load(self, f: str) -> dict:
        checkpoint = self._source if isinstance(self._source, Checkpoint) else Checkpoint.read(f)
        weights = checkpoint.weights
        if checkpoint.average is not None and (self.use_average or not self.complete):
            logger.info("Using the moving average of the weights in %s.", f)
            weights = checkpoint.average
        elif self.use_average and checkpoint.metric is None:  # the best weights are the average already
            logger.warning("%s holds no moving average of the weights: using its weights.", f)
        elif self.complete and checkpoint.average is not None and "average" not in self.checkpointables:
            logger.warning("%s also holds a moving average of the weights; SOLVER.EMA.ENABLED True uses it.", f)
        return {**checkpoint.entries, "model": dict(weights)}  # copies, since fvcore takes entries out

    def _load_model(self, checkpoint: dict):
        if not checkpoint.get("matching_heuristics", False):
            check_fit(self._path, self.model, checkpoint["model"], complete=self.complete)
        elif self.complete:
            raise UserError(
                f"{self._path} holds a pretrained backbone, not a trained detector: name a checkpoint of this model in "
                "MODEL.WEIGHTS."
            )
        pretrained = checkpoint.get("matching_heuristics", False)
        incompatible = super()._load_model(checkpoint)
        if pretrained:
            check_backbone(self._path, self.model, incompatible.missing_keys)
        reset = class_parameters(name for name, *_ in incompatible.incorrect_shapes)
        if reset:
            logger.warning(
                "%s was trained with another number of classes: %s start from scratch.", self._path, ", ".join(reset)
            )
        own, theirs = self.description.get("class_names"), checkpoint.get("class_names")
        if not self.complete and own and theirs and own != theirs and len(own) == len(theirs):
            logger.warning(
                "%s was trained on other classes (%s), as many as here: each class starts from the weights of the one with its "
                "number.",
                self._path,
                one_line(", ".join(theirs[:5]) + (", ..." if len(theirs) > 5 else "")),
            )
        return incompatible


def _iteration_of(path: str) -> float:
    """Return the iteration of a checkpoint, without reading its weights; -infinity if it is damaged."""
    try:
        iteration = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["iteration"]
        return iteration if isinstance(iteration, int) else -math.inf
    except Exception:  # torch raises many types for damaged files
        return -math.inf
