"""The folder of a run: it belongs to one run at a time, and its metrics name every iteration once."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator

from ..checkpoint.checkpoint import write_atomically
from ..errors import UserError

__all__ = ["keep_metrics_before", "lock_folder", "set_metrics_aside", "write_metrics"]


@contextlib.contextmanager
def lock_folder(folder: str) -> Iterator[None]:
    """Create a folder if need be, and keep other runs from writing to it until the end of the context.

    Raises:
        UserError: it cannot be created or written to, or another run works there.
    """
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (open for as long as the lock is held)
    except OSError as error:
        raise UserError(f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}): name another folder.") from error
    with file:
        try:
            # Not flock, which data-loading workers would inherit, and hold for seconds after the run was killed.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(
                f"OUTPUT_DIR {folder}: another run is training there ({file.read().strip() or 'unknown'}): wait for its end, "
                "or name another folder."
            ) from error
        except OSError:  # file systems without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def set_metrics_aside(folder: str) -> None:
    """Rename the ``metrics.json`` of an earlier run, which left no checkpoint, to make room for a new one."""
    path = os.path.join(folder, "metrics.json")
    number = 1
    while os.path.exists(earlier := os.path.join(folder, f"metrics_earlier_{number}.json")):
        number += 1
    if os.path.exists(path):
        os.replace(path, earlier)


def keep_metrics_before(folder: str, iteration: int, complete: bool = False) -> dict[int, dict]:
    """Remove from ``metrics.json`` what a resumed run does again, and return the remaining lines by iteration.

    Args:
        folder: of the run.
        iteration: the one that the run goes on with; lines from there on go, and those that cannot be read.
        complete: whether the run only evaluates again. Otherwise the final evaluation of a run that was shorter stays, which
            detectron2 counts as one iteration later than those during training.
    """
    path = os.path.join(folder, "metrics.json")
    if not os.path.exists(path):
        return {}
    kept: dict[int, dict] = {}
    with open(path, errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                number = entry.get("iteration") if isinstance(entry, dict) else None
                if number == iteration and not complete and "total_loss" not in entry:
                    number -= 1
                if isinstance(number, int) and number < iteration:
                    kept[number] = {**kept.get(number, {}), **entry, "iteration": number}
    with write_atomically(path) as file:
        file.write("".join(json.dumps(entry) + "\n" for entry in kept.values()).encode())
    return kept


def write_metrics(folder: str, entry: dict) -> None:
    """Add a line to ``metrics.json``."""
    with open(os.path.join(folder, "metrics.json"), "a") as file:
        file.write(json.dumps(entry) + "\n")
