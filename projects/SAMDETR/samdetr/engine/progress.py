"""A progress bar for training on a terminal: steps, time left, loss and AP. Elsewhere, detectron2's lines stay as they are."""

import contextlib
import logging
import sys

from detectron2.engine import HookBase
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

__all__ = ["ProgressBar"]

_METRIC_LINES = "detectron2.utils.events"  # the logger of what the bar shows


class ProgressBar(HookBase):
    """Show a bar below the log. What it shows is left out of the console's log, and stays in that of the file.

    Args:
        metric: the metric of evaluations to show, such as "bbox/AP".
    """

    def __init__(self, metric: str):
        self.metric = metric
        self.bar: tqdm | None = None
        self._redirection = contextlib.ExitStack()

    @staticmethod
    def is_wanted() -> bool:
        """Return whether the log goes to a terminal."""
        return sys.stdout.isatty() and sys.stderr.isatty()

    def before_train(self):
        done, total = self.trainer.start_iter, self.trainer.max_iter
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05, file=sys.stderr)
        loggers = [logging.getLogger(name) for name in ("detectron2", "samdetr", "fvcore")]
        self._redirection.enter_context(logging_redirect_tqdm(loggers, tqdm_class=tqdm))
        for handler in {handler for logger in loggers for handler in logger.handlers}:
            if getattr(handler, "stream", None) in (
                sys.stdout,
                sys.stderr,
            ):  # not a file, which detectron2 opens as a stream
                handler.addFilter(lambda record: record.name != _METRIC_LINES)

    def after_step(self):
        latest = self.trainer.storage.latest()
        shown = {"loss": f"{latest['total_loss'][0]:.2f}"} if "total_loss" in latest else {}
        if self.metric in latest:
            shown["AP"] = f"{latest[self.metric][0]:.1f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def after_train(self):
        if self.bar is not None:
            self.bar.close()
            self._redirection.close()
