"""Stop a run by a signal without losing its work: the step is finished and saved first."""

import contextlib
import logging
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Collection, Iterator

import torch
from detectron2.utils import comm

__all__ = [
    "StopRequested",
    "StoppableLoader",
    "catch_signals",
    "ignore_signals",
    "is_lost_partner",
    "pass_signals_on",
    "received_signal",
]

logger = logging.getLogger(__name__)

# What a terminal sends on Ctrl-C, and schedulers before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME_SIGNAL = 2.0  # seconds
_received: list[int] = []


class StopRequested(SystemExit):
    """A signal has asked this process to stop; it exits with 128 + the signal's number, as shells report it."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


def received_signal() -> int | None:
    """Return the number of the signal that has asked this process to stop; None if none has."""
    return _received[0] if _received else None


@contextlib.contextmanager
def catch_signals() -> Iterator[None]:
    """Remember SIGINT and SIGTERM instead of ending at once. Another one, seconds later, ends at once after all."""
    first = math.inf

    def remember(number, frame):
        nonlocal first
        if _received:
            # The same signal may come twice, to the process group and from the process that has started this one.
            if time.monotonic() - first > _SAME_SIGNAL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        first = time.monotonic()
        _received.append(number)
        logger.warning("%s received: stopping after this step. Once more ends at once.", signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Ignore SIGINT and SIGTERM until the end of :func:`catch_signals`, while what they have asked for is done."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def pass_signals_on() -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the processes that this one has started, which save and end; so does this one then."""

    def pass_on(number, frame):
        for process in multiprocessing.active_children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_lost_partner(error: RuntimeError) -> bool:
    """Return whether an error of a collective operation says that another process has gone."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return "gloo" in text or "connection reset by peer" in text or "connection closed by peer" in text


class StoppableLoader:
    """Wrap a loader for evaluation, which a signal may interrupt between two batches.

    Raises:
        StopRequested: at the end of its iteration, in every process, if any of them has received a signal.
    """

    def __init__(self, loader: Collection):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            if received_signal() is not None:
                break
            yield batch
        # Together, since those that have more batches left would wait for the others, which have ended, to save.
        number = max(comm.all_gather(received_signal() or 0))
        if number:
            raise StopRequested(number)
