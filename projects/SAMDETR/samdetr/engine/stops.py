"""Stop a run by a signal without losing its work: the step is finished and saved first."""

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator

import torch

__all__ = [
    "StopRequested",
    "StoppableLoader",
    "catch_signals",
    "is_lost_partner",
    "pass_signals_on",
    "received_signal",
]

logger = logging.getLogger(__name__)

# What a terminal sends on Ctrl-C, and schedulers before they kill.
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
    """Remember SIGINT and SIGTERM instead of ending at once. A second one ends at once after all."""

    def remember(number, frame):
        if _received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _received.append(number)
        logger.warning("%s received: stopping after this step. Once more ends at once.", signal.Signals(number).name)

    before = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield
    finally:
        _received.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


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
        StopRequested: while it is iterated, when a signal has been received.
    """

    def __init__(self, loader: Iterable):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        for batch in self.loader:
            number = received_signal()
            if number is not None:
                raise StopRequested(number)
            yield batch
