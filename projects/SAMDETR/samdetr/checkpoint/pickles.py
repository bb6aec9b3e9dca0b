"""Read the weights of detectron2's model zoo, which are pickles, without running any code in them."""

import pickle
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager

from ..errors import UserError

__all__ = ["read_model_zoo_pickle"]

# What arrays and plain containers are made of, in pickles of numpy 1 and 2.
_ALLOWED = {
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("__builtin__", "bytes"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows arrays and plain containers only."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and loading that can run code")
        return super().find_class(module, name)


def read_model_zoo_pickle(path: str, name: str = "MODEL.WEIGHTS") -> dict[str, Any]:
    """Read a ``.pkl`` file of weights, in the form in which detectron2's checkpointer takes it.

    Args:
        path: of the file, on this machine.
        name: what to call the file in a message.

    Returns:
        A dict with the entry ``model``, of arrays by name. With ``matching_heuristics``, the names are those of another
        project, which detectron2 translates.

    Raises:
        UserError: the file is missing or damaged, or holds something other than arrays.
    """
    try:
        with PathManager.open(path, "rb") as file:
            data = _ArrayUnpickler(file, encoding="latin1").load()  # those of Python 2
    except Exception as error:  # damaged pickles raise many types
        raise UserError(
            f"{name} {path} is damaged or not a file of weights ({type(error).__name__}: {error}): name another file."
        ) from error
    if not isinstance(data, dict) or not all(isinstance(data.get(key, {}), dict) for key in ("model", "blobs")):
        raise UserError(f"{name} {path} does not hold weights by name.")
    if not ("model" in data and "__author__" in data):  # Caffe2's, perhaps with the state of its optimizer
        blobs = data.get("blobs", data)
        weights = {key: value for key, value in blobs.items() if not str(key).endswith("_momentum")}
        data = {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
    for key, value in data["model"].items():
        numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iufb" and value.dtype.itemsize <= 8
        if not isinstance(key, str) or not numbers:
            raise UserError(f"{name} {path} is not a file of weights: {key!r} is no array of numbers.")
    return data
