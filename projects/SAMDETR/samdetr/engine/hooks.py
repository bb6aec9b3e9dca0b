"""What happens between the steps of a run: the average, checkpoints of the best weights, evaluations, metrics, stops."""

import contextlib
import logging
import math
import os

from detectron2.engine import HookBase
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from detectron2.utils.file_io import PathManager

from ..checkpoint import CheckedCheckpointer, Checkpoint
from ..errors import UserError
from ..modeling.criterion import WRITING_PERIOD
from .output import merge_metrics

__all__ = ["Evaluate", "KeepBest", "StopEarly", "StopOnSignal", "UpdateAverage", "WriteEpoch", "WriteMetrics"]

logger = logging.getLogger(__name__)


class WriteEpoch(HookBase):
    """Write the epoch, the number of passes over the images so far, beside the other metrics."""

    def after_step(self):
        epoch = self.trainer.data_loader.epoch(self.trainer.iter + 1)
        self.trainer.storage.put_scalar("epoch", epoch, smoothing_hint=False)


class UpdateAverage(HookBase):
    """Update the exponential moving average of the weights after each step."""

    def after_step(self):
        self.trainer.average.update_parameters(self.trainer.inner_model)


class StopOnSignal(HookBase):
    """End the run after a step in which any process has received SIGINT or SIGTERM."""

    def after_step(self):
        number = self.trainer._trainer.agreed_signal
        if number:
            self.trainer.save_and_stop(number)


class Evaluate(EvalHook):
    """detectron2's hook, which also makes up for an evaluation that a stopped run has missed."""

    def before_train(self):
        if self.trainer.evaluation_missed:
            self.trainer.storage.iter = self.trainer.iter
            self._do_eval()

    def after_train(self):
        # Not after an error in the last step, which other processes may wait in.
        if self.trainer.iter == self.trainer.max_iter:
            super().after_train()


class KeepBest(HookBase):
    """Keep the evaluated weights with the best AP in ``model_best.pth``, with that AP, which a resumed run reads from there.

    This hook comes after the evaluation. Unlike detectron2's BestCheckpointer, it does not forget the best when a run is
    resumed, and does not mark its file as the one to resume from.
    """

    def __init__(self, checkpointer: CheckedCheckpointer, period: int, metric: str):
        self.checkpointer = checkpointer
        self.period = period
        self.metric = metric
        self.best = -math.inf  # in model_best.pth
        self.best_so_far = -math.inf  # up to this step; less than that, where a resumed run repeats the way to it
        self.without_gain = 0  # evaluations that have found an AP, since the best one so far
        self._seen = -1  # iteration of the last such evaluation

    def before_train(self):
        earlier = {
            iteration: line[self.metric]
            for iteration, line in sorted(self.trainer.earlier_metrics.items())
            if isinstance(line.get(self.metric), float | int) and math.isfinite(line[self.metric])
        }
        for value in earlier.values():
            self._count(value)
        path = os.path.join(self.checkpointer.save_dir, "model_best.pth")
        if self.trainer.start_iter > 0 and PathManager.isfile(path):
            try:
                kept = Checkpoint.read(path, name="The best checkpoint")
            except UserError as error:
                logger.error("%s The next evaluation replaces it.", error)
            else:
                evaluated_on, config = self.trainer.cfg.DATASETS.TEST[0], None
                with contextlib.suppress(UserError):  # of another version: taken to be of the same data
                    config = kept.config()
                before = config.DATASETS.TEST[0] if config is not None and config.DATASETS.TEST else evaluated_on
                if before != evaluated_on:
                    self._set_aside(path, before)
                elif kept.metric is not None and math.isfinite(kept.metric):
                    self.best, best_at = kept.metric, kept.iteration or 0
                    # A run that was complete and goes on has evaluated "after" its last step, see keep_metrics_before.
                    final = earlier.get(self.trainer.start_iter - 1) == self.best and best_at == self.trainer.start_iter
                    if final or best_at < self.trainer.start_iter - self.trainer.evaluation_missed:
                        # Not since the best of all lines: earlier ones may be of other data.
                        self.best_so_far = self.best
                        self.without_gain = sum(iteration > best_at for iteration in earlier)
        if self.trainer.evaluation_missed:
            self._keep()

    def _set_aside(self, path: str, dataset: str) -> None:
        """Keep the best weights of an evaluation on other data under another name: their AP is not to be compared."""
        folder, number = self.checkpointer.save_dir, 1
        name = stem = f"model_best_{dataset.replace('/', '_')}"
        while os.path.exists(os.path.join(folder, f"{name}.pth")):
            number += 1
            name = f"{stem}_{number}"
        name += ".pth"
        os.replace(path, os.path.join(folder, name))
        self.best_so_far, self.without_gain = -math.inf, 0
        logger.warning(
            "model_best.pth was the best on %s, not on %s: it is now %s, and the best is looked for from here on.",
            *(dataset, self.trainer.cfg.DATASETS.TEST[0], name),
        )

    def after_step(self):
        next_iter = self.trainer.iter + 1
        if self.period > 0 and next_iter % self.period == 0 and next_iter != self.trainer.max_iter:
            self._keep()

    def after_train(self):
        if self.trainer.iter == self.trainer.max_iter:  # complete: not after an error in the last step
            self._keep()

    def _keep(self):
        value, iteration = self.trainer.storage.latest().get(self.metric, (math.nan, -1))
        if not math.isfinite(value) or iteration == self._seen:  # this evaluation has found no AP
            return
        self._seen = iteration
        self._count(value)
        if value > self.best:
            self.best = value
            self.checkpointer.save("model_best", iteration=iteration, metric=value, tag=False)
            logger.info("Best %s so far, %.2f at iteration %d: kept in model_best.pth.", self.metric, value, iteration)

    def _count(self, value: float) -> None:
        self.without_gain = 0 if value > self.best_so_far else self.without_gain + 1
        self.best_so_far = max(self.best_so_far, value)


class StopEarly(HookBase):
    """End the run, complete, when too many evaluations in a row have not improved the best AP."""

    def __init__(self, patience: int, period: int, keep_best: KeepBest | None):
        self.patience = patience
        self.period = period
        self.keep_best = keep_best  # on the main process, which decides for all

    def before_train(self):
        self._stop_if_due(self.trainer.start_iter)

    def after_step(self):
        done = self.trainer.iter + 1
        if done % self.period == 0 and done < self.trainer.max_iter:
            self._stop_if_due(done)

    def _stop_if_due(self, done: int):
        without_gain = self.keep_best.without_gain if self.keep_best is not None else 0
        without_gain = comm.all_gather(without_gain)[0]
        if without_gain >= self.patience:
            logger.warning(
                "Training ends after iteration %d of %d: the last %d evaluations have not improved the best AP, and "
                "SOLVER.PATIENCE is %d. A higher one, with a resumed run, goes on from here.",
                *(done - 1, self.trainer.max_iter, without_gain, self.patience),
            )
            self.trainer.max_iter = done


class WriteMetrics(HookBase):
    """Write the metrics every ``WRITING_PERIOD`` steps and after each evaluation, which a stopped run must not lose."""

    def __init__(self, build_writers, folder: str, evaluation_period: int):
        self.build_writers = build_writers
        self.folder = folder
        self.periods = [period for period in (WRITING_PERIOD, evaluation_period) if period > 0]
        self.writers: list[EventWriter] = []

    def before_train(self):
        # Not earlier: a resumed run has to go through the file first.
        if self.trainer.evaluation_missed:
            latest = self.trainer.storage.latest().items()
            results = {name: value for name, (value, step) in latest if step == self.trainer.iter}
            merge_metrics(self.folder, {"iteration": self.trainer.iter, **results})
        self.writers = self.build_writers()
        for writer in self.writers:
            if isinstance(writer, JSONWriter):
                writer._last_write = self.trainer.iter  # what is up to there is in the file
        if self.trainer.evaluation_missed:
            self._write()

    def after_step(self):
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            self._write()

    def after_train(self):
        self._write()
        for writer in self.writers:
            writer.close()
        merge_metrics(self.folder)  # a complete run that was resumed has evaluated again

    def _write(self):
        for writer in self.writers:
            writer.write()
