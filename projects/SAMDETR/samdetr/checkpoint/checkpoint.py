"""The format of this project's checkpoints, and the one place that reads and writes them.

A checkpoint is a file of ``torch.save`` with a dict of these entries, of which all but ``model`` may be missing:

===================  ===================================================================================================
``model``            the weights, by name; in ``model_best.pth`` those that were evaluated, the average with ``SOLVER.EMA``
``average``          the moving average of the weights, by name with the prefix "module." (with ``SOLVER.EMA``)
``config``           the full config of the run, as YAML text
``class_names``      the classes' names, by index
``category_ids``     the dataset's own ids of the classes, by index
``trainer``          optimizer, schedule, iteration and whatever else a run resumes from
``iteration``        the iteration after which it was saved
``metric``           in ``model_best.pth``: the AP
===================  ===================================================================================================
"""

import contextlib
import os
import pickle
import re
import socket
import zipfile
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..config import number_of_classes, parse_config
from ..errors import UserError, import_extra, one_line_each
from .pickles import read_model_zoo_pickle
from .transformers_format import convert_transformers_state_dict, is_transformers_state_dict

__all__ = ["Checkpoint", "describe_run", "write_atomically"]

_IS_FOLDER = 0x10  # among the attributes of an entry of a zip archive

_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": dict,
    "average": dict,
    "config": str,
    "class_names": (list, tuple),
    "category_ids": (list, tuple),
    "trainer": dict,
    "iteration": int,
    "metric": (int, float),
}


class Checkpoint:
    """What a checkpoint holds, read once and verified.

    Attributes:
        entries: all entries of the file.
        path: where it was read from.
    """

    def __init__(self, entries: dict[str, Any], path: str = ""):
        self.entries = entries
        self.path = path

    @classmethod
    def read(cls, path: str | os.PathLike, *, name: str = "MODEL.WEIGHTS", allow_objects: bool = False) -> "Checkpoint":
        """Read a file, opening it once, and verify the checksums of its contents.

        Args:
            path: of the file, on this machine. A plain dict of tensors, without the entry ``model``, is accepted as well; so is
                one of a DETR of ``transformers``, also as ``.safetensors``, whose parameters get this project's names.
            name: what to call the file in a message: the key or argument that names it.
            allow_objects: whether to load Python objects other than tensors and plain containers, which can run code.

        Raises:
            UserError: the file is missing, truncated, damaged, not a checkpoint, or holds objects.
        """
        path = os.fspath(path)
        if not PathManager.isfile(path):
            raise UserError(f"{name} {path}: there is no such file (looked in {os.getcwd()}).")
        if path.endswith(".pkl"):
            return cls(read_model_zoo_pickle(path, name), path)
        if path.endswith(".safetensors"):
            return cls._of_weights(_read_safetensors(path, name), path, name)
        with PathManager.open(path, "rb") as file:
            try:
                if zipfile.is_zipfile(file):
                    archive = zipfile.ZipFile(file)
                    damaged = archive.testzip()
                    if damaged is not None:
                        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
                    # torch does not read what is marked as a folder, and leaves the tensor's memory as it happens to be.
                    folders = [entry.filename for entry in archive.infolist() if entry.external_attr & _IS_FOLDER]
                    if folders:
                        raise zipfile.BadZipFile(f"{folders[0]} is marked as a folder")
                file.seek(0)
                entries = torch.load(file, map_location="cpu", weights_only=not allow_objects)
            except Exception as error:  # torch raises many types for damaged files
                objects = _foreign_objects(file, error) if isinstance(error, pickle.UnpicklingError) else []
                if objects:
                    raise UserError(
                        f"{name} {path} holds Python objects beside tensors ({', '.join(objects)}), and loading them can run "
                        "code, so they are refused. If you trust the file, load it once with torch.load(path, "
                        'weights_only=False) and save only its "model" entry.',
                        argument="allow_objects",
                    ) from error
                details = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
                raise UserError(
                    f"{name} {path} is truncated, damaged or not a checkpoint ({type(error).__name__}{details}): copy it "
                    "again, or name another file."
                ) from error
        if not isinstance(entries, dict):
            raise UserError(f"{name} {path} holds a {type(entries).__name__}, not a checkpoint's dict.")
        if "model" not in entries:
            return cls._of_weights(entries, path, name)
        checkpoint = cls(entries, path)
        checkpoint._check_entries(name)
        return checkpoint

    @classmethod
    def _of_weights(cls, weights: dict, path: str, name: str) -> "Checkpoint":
        checkpoint = cls({"model": weights}, path)
        checkpoint._check_entries(name)
        if is_transformers_state_dict(weights):
            try:
                checkpoint.entries["model"] = convert_transformers_state_dict(weights)
            except ValueError as error:
                raise UserError(f"{name} {path} cannot be used: {error}") from error
        return checkpoint

    @classmethod
    def read_local(cls, path: str | None, *, name: str = "MODEL.WEIGHTS") -> "Checkpoint | None":
        """Read a file as :meth:`read` does; return None for what is left to detectron2: no path, or an address."""
        path, _, options = (path or "").partition("?")
        if options and os.path.exists(f"{path}?{options}"):
            raise UserError(
                f'{name} {path}?{options}: detectron2 takes what follows a "?" for options of its own. Rename the file.'
            )
        return cls.read(path, name=name) if path and "://" not in path else None

    def _check_entries(self, name: str) -> None:
        """Refuse a file whose entries are not of the types above."""
        for key, kind in _TYPES.items():
            value = self.entries.get(key)
            if not isinstance(value, kind) and (value is not None or key == "model"):
                raise UserError(
                    f"{name} {self.path} is damaged or not a checkpoint of this project: its entry {key!r} is a "
                    f"{type(value).__name__}. Name another file."
                )
        for key in ("model", "average"):
            for parameter, value in (self.entries.get(key) or {}).items():
                usable = not isinstance(value, Tensor) or (
                    value.layout == torch.strided and not value.is_meta and not value.is_complex()
                )
                if not isinstance(parameter, str) or not usable:
                    raise UserError(
                        f"{name} {self.path} is damaged or not a checkpoint of this project: in its entry {key!r}, "
                        f"{parameter!r} is no dense array of real numbers by name. Name another file."
                    )
        for key, kind in (("class_names", str), ("category_ids", int)):
            values = self.entries.get(key)
            if values is not None and not all(isinstance(value, kind) for value in values):
                raise UserError(
                    f"{name} {self.path} is damaged or not a checkpoint of this project: its entry {key!r} has others than "
                    f"{kind.__name__} in it. Name another file."
                )

    def write(self, path: str | os.PathLike) -> None:
        """Write the file, whole or not at all.

        Raises:
            UserError: it cannot be written, for example because the disk is full.
        """
        try:
            with write_atomically(path) as file:
                torch.save(self.entries, file)
        except (OSError, RuntimeError) as error:  # torch's own is a RuntimeError
            cause = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"{path} cannot be written ({type(cause).__name__}: {cause}). What was saved before is whole: make room, and "
                "resume from it."
            ) from error

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights, by name."""
        return self.entries["model"]

    @property
    def average(self) -> dict[str, Tensor] | None:
        """The moving average of the weights, under the names of :attr:`weights`; None if there is none."""
        if self.entries.get("average") is None:
            return None
        average = self.entries["average"].items()
        return {key.removeprefix("module."): value for key, value in average if key.startswith("module.")}

    @property
    def class_names(self) -> list[str] | None:
        """The classes' names, by index; None if the file does not know them."""
        names = self.entries.get("class_names")
        return None if names is None else one_line_each(names)

    @property
    def category_ids(self) -> list[int] | None:
        """The training dataset's own ids of the classes, by index; None if the file does not know them."""
        return self.entries.get("category_ids")

    @property
    def iteration(self) -> int | None:
        """The iteration after which it was saved; None if the file does not know it."""
        return self.entries.get("iteration")

    @property
    def metric(self) -> float | None:
        """The AP of the weights, in ``model_best.pth``; elsewhere None."""
        return self.entries.get("metric")

    def config(self) -> CfgNode | None:
        """Return the config of the run, with this file as ``MODEL.WEIGHTS``; None if the file carries none.

        Raises:
            UserError: it is the config of another version of this project.
        """
        if "config" not in self.entries:
            return None
        try:
            cfg = parse_config(self.entries["config"])
        except UserError as error:
            raise UserError(
                f"{self.path} carries a config of another version of this project ({error}): name a config file that fits.",
                argument="config_file",
            ) from error
        cfg.MODEL.WEIGHTS = self.path
        return cfg


def describe_run(cfg: CfgNode) -> dict[str, Any]:
    """Return the entries of a checkpoint that make it usable without anything else.

    Args:
        cfg: the config of the run, whose training datasets are registered.

    Returns:
        ``config``, ``class_names`` and ``category_ids``, see above; the latter two are None if the dataset does not name its
        classes.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]) if len(cfg.DATASETS.TRAIN) else None
    names = metadata and metadata.get("thing_classes")
    ids = metadata and metadata.get("thing_dataset_id_to_contiguous_id")
    if names and len(names) != number_of_classes(cfg)[1]:
        names = ids = None
    return {
        "config": cfg.dump(),
        "class_names": one_line_each(names) if names else None,
        "category_ids": sorted(ids, key=ids.get) if ids else None,
    }


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike):
    """Open a file for writing that appears under its name only when all of it is on the disk."""
    path = os.fspath(path)
    temporary = f"{path}.{socket.gethostname()}-{os.getpid()}.part"  # others may write the same file at the same time
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def _read_safetensors(path: str, name: str) -> dict[str, Tensor]:
    safetensors = import_extra("safetensors.torch", "safetensors")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # safetensors raises types of its own
        raise UserError(
            f"{name} {path} is truncated, damaged or not a file of weights ({type(error).__name__}: {error}): copy it again, "
            "or name another file."
        ) from error


def _foreign_objects(file, error: pickle.UnpicklingError) -> list[str]:
    """Return the names of the Python objects that loading the file would need; empty if that is not known."""
    try:
        file.seek(0)
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # not a checkpoint at all, or one of torch's old format: then the error names the first of them
        return re.findall(r"Unsupported global: GLOBAL ([A-Za-z_][\w.]*)", str(error))
