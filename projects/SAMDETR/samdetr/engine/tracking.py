"""Writers that show a run in Weights & Biases or MLflow, beside metrics.json and TensorBoard.

A run that is resumed goes on in the same place, which ``tracking.json`` in the output folder names. A tracker that cannot be
reached costs its own record only: one warning, and training goes on.
"""

import json
import logging
import os
import re
from pathlib import Path

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import import_extra, one_line
from ..modeling.criterion import WRITING_PERIOD

__all__ = ["MLflowWriter", "TrackingWriter", "WandbWriter", "build_trackers", "import_trackers"]

logger = logging.getLogger(__name__)


class TrackingWriter(EventWriter):
    """Send the metrics of a run to a tracker; a subclass knows the tracker's own calls.

    Args:
        cfg: the run's config, which is shown with it.
        name: of the tracker.
    """

    def __init__(self, cfg: CfgNode, name: str):
        self.name = name
        self.file = Path(cfg.OUTPUT_DIR, "tracking.json")
        self.last_write = -1
        self.works = True
        self._try(self._begin, cfg)

    def _begin(self, cfg: CfgNode) -> None:
        """Begin a run, or go on with the one of :meth:`earlier_run`."""
        raise NotImplementedError

    def _send(self, metrics: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _end(self) -> None:
        raise NotImplementedError

    def write(self):
        """Send what is new since the last call, by iteration."""
        by_step: dict[int, dict[str, float]] = {}
        storage = get_event_storage()
        for name, (value, step) in storage.latest_with_smoothing_hint(WRITING_PERIOD).items():
            if step > self.last_write:
                by_step.setdefault(step, {})[name] = value
        for step, metrics in sorted(by_step.items()):
            self._try(self._send, metrics, step)
            self.last_write = step

    def close(self):
        self._try(self._end)

    def earlier_run(self) -> str | None:
        """Return the id of the run that this one goes on with."""
        return self._runs().get(self.name)

    def remember_run(self, run_id: str) -> None:
        self.file.write_text(json.dumps({**self._runs(), self.name: run_id}) + "\n")

    def _runs(self) -> dict[str, str]:
        try:
            return json.loads(self.file.read_text())
        except (OSError, ValueError):  # there is none, or it is damaged
            return {}

    def _try(self, call, *arguments) -> None:
        """Call the tracker, unless it has failed before."""
        if not self.works:
            return
        try:
            call(*arguments)
        except Exception as error:  # the trackers' errors have no common base
            self.works = False
            logger.warning(
                "%s does not work (%s: %s). This run goes on without it; its metrics are in %s.",
                *(self.name, type(error).__name__, one_line(error), self.file.with_name("metrics.json")),
            )


class WandbWriter(TrackingWriter):
    """Weights & Biases. Its own variables apply, such as WANDB_MODE=offline."""

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg, "Weights & Biases")

    def _begin(self, cfg: CfgNode) -> None:
        wandb = import_extra("wandb", "wandb")
        self.run = wandb.init(
            project=cfg.TRACKING.WANDB_PROJECT,
            name=_run_name(cfg),
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            id=self.earlier_run(),
            resume="allow",
            settings=wandb.Settings(init_timeout=60, silent=True),
        )
        self.remember_run(self.run.id)
        logger.info("Weights & Biases shows this run: %s", self.run.url or self.run.dir)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def _end(self) -> None:
        self.run.finish()


class MLflowWriter(TrackingWriter):
    """MLflow. Its own variables apply, such as MLFLOW_TRACKING_URI, the server's address or a database."""

    def __init__(self, cfg: CfgNode):
        # Otherwise a server that does not answer would hold the run up for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        super().__init__(cfg, "MLflow")

    def _begin(self, cfg: CfgNode) -> None:
        self.mlflow = import_extra("mlflow", "mlflow-skinny")
        self.mlflow.set_experiment(cfg.TRACKING.MLFLOW_EXPERIMENT)
        earlier = self.earlier_run()
        run = self.mlflow.start_run(run_id=earlier, run_name=None if earlier else _run_name(cfg))
        self.remember_run(run.info.run_id)
        if not earlier:
            self.mlflow.log_text(cfg.dump(), "config.yaml")
            keys = {"config": cfg.MODEL.META_ARCHITECTURE, "max_iter": cfg.SOLVER.MAX_ITER, "seed": cfg.SEED}
            self.mlflow.log_params({**keys, "base_lr": cfg.SOLVER.BASE_LR, "ims_per_batch": cfg.SOLVER.IMS_PER_BATCH})
        logger.info("MLflow shows this run: %s, run %s", self.mlflow.get_tracking_uri(), run.info.run_id)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        # MLflow takes these characters in a name only; class names have others.
        named = {re.sub(r"[^\w\-. /]", "_", name): value for name, value in metrics.items()}
        self.mlflow.log_metrics(named, step=step)

    def _end(self) -> None:
        self.mlflow.end_run()


def _run_name(cfg: CfgNode) -> str:
    return cfg.TRACKING.RUN_NAME or Path(cfg.OUTPUT_DIR).resolve().name


def import_trackers(cfg: CfgNode) -> None:
    """Import the packages of the trackers that a config names.

    Raises:
        UserError: one is not installed.
    """
    if cfg.TRACKING.WANDB_PROJECT:
        import_extra("wandb", "wandb")
    if cfg.TRACKING.MLFLOW_EXPERIMENT:
        import_extra("mlflow", "mlflow-skinny")


def build_trackers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers of the trackers that a config names."""
    trackers: list[EventWriter] = []
    if cfg.TRACKING.WANDB_PROJECT:
        trackers.append(WandbWriter(cfg))
    if cfg.TRACKING.MLFLOW_EXPERIMENT:
        trackers.append(MLflowWriter(cfg))
    return trackers
