"""The folder of a run: it belongs to one run at a time, and its metrics name every iteration once."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator

from ..checkpoint.checkpoint import write_atomically
from ..errors import UserError

__all__ = ["keep_metrics_before", "lock_folder", "merge_metrics", "set_metrics_aside"]

_OF_ONE_RUN = ("metrics.json", "tracking.json", "events.out.tfevents.")


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
    """Rename what tells of an earlier run, which left no checkpoint, to make room for a new one.

    These are ``metrics.json``, ``tracking.json`` and TensorBoard's files, which would all be drawn as one run.
    """
    number = 1
    while os.path.exists(os.path.join(folder, f"earlier_{number}")):
        number += 1
    files = (
        [entry for entry in os.scandir(folder) if entry.name.startswith(_OF_ONE_RUN)] if os.path.isdir(folder) else []
    )
    for entry in files:
        os.makedirs(os.path.join(folder, f"earlier_{number}"), exist_ok=True)
        os.replace(entry.path, os.path.join(folder, f"earlier_{number}", entry.name))


def _read(path: str) -> dict[int, dict]:
    """Return the lines of ``metrics.json`` that can be read, merged by iteration."""
    lines: dict[int, dict] = {}
    if os.path.exists(path):
        with open(path, errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    number = entry.get("iteration") if isinstance(entry, dict) else None
                    if type(number) is int and number >= 0:
                        lines[number] = {**lines.get(number, {}), **entry}
    return lines


def _write(path: str, lines: dict[int, dict]) -> None:
    with write_atomically(path) as file:
        file.write("".join(json.dumps(lines[number]) + "\n" for number in sorted(lines)).encode())


def keep_metrics_before(folder: str, iteration: int, *, complete: bool = False) -> dict[int, dict]:
    """Remove from ``metrics.json`` what a resumed run does again, and return the remaining lines by iteration.

    detectron2 counts a run's final evaluation as one iteration later than those during training. That of a run which now
    goes on becomes one during training.

    Args:
        folder: of the run.
        iteration: the one that the run goes on with; lines from there on go, and those that cannot be read.
        complete: whether the run has no more steps to do, so that its final evaluation stays what it is.
    """
    path = os.path.join(folder, "metrics.json")
    lines = _read(path)
    kept = {number: entry for number, entry in lines.items() if number < iteration}
    final = lines.get(iteration, {})
    if final and "total_loss" not in final:
        number = iteration if complete else iteration - 1
        kept[number] = {**kept.get(number, {}), **final, "iteration": number}
    if lines:
        _write(path, kept)
    return kept


def merge_metrics(folder: str, entry: dict | None = None) -> None:
    """Write each iteration of ``metrics.json`` in one line, together with a further entry; later values count."""
    path = os.path.join(folder, "metrics.json")
    lines = _read(path)
    if entry is not None:
        lines[entry["iteration"]] = {**lines.get(entry["iteration"], {}), **entry}
    if lines:
        _write(path, lines)
