"""detectron2's trainer with this project's data, optimizer, steps and checkpoints."""

import contextlib
import logging
import os
import signal
import weakref
from pathlib import Path

import torch
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from ..checkpoint import CheckedCheckpointer, Checkpoint, describe_run
from ..config import number_of_classes
from ..data import (
    build_test_loader,
    build_train_loader,
    classes_by_index,
    load_records,
    resolve_epochs,
    warn_about_capacity,
)
from ..errors import UserError
from ..modeling.build import build_detector
from ..solver import MovingAverage, autocast, build_optimizer
from .evaluation import CheckedEvaluator, build_evaluator, write_results
from .hooks import Evaluate, KeepBest, StopEarly, StopOnSignal, UpdateAverage, WriteEpoch, WriteMetrics
from .output import keep_metrics_before, set_metrics_aside
from .progress import ProgressBar
from .stops import StoppableLoader, StopRequested, catch_signals, ignore_signals
from .tracking import build_trackers, import_trackers
from .train_step import TrainStep

__all__ = ["Trainer", "evaluate"]

logger = logging.getLogger(__name__)


def freeze_unused_backbone(model: torch.nn.Module) -> None:
    """Freeze the backbone's parameters that no used feature depends on, such as those of an FPN's other levels.

    They would never get a gradient, and DistributedDataParallel would wait for one.
    """
    if not hasattr(model, "in_features"):
        return
    backbone = model.backbone
    trainable = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    divisor = max(1, backbone.size_divisibility)
    side = -(-64 // divisor) * divisor
    was_training = backbone.training
    features = backbone.eval()(torch.zeros(1, 3, side, side, device=model.device))
    backbone.train(was_training)
    total = sum(features[name].sum() for name in model.in_features)
    if not trainable or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    unused = [name for name, gradient in zip(trainable, gradients) if gradient is None]
    for name in unused:
        trainable[name].requires_grad_(False)
    if unused:
        logger.warning(
            "MODEL.SAMDETR.IN_FEATURES does not use these parameters of the backbone, which stay as they are: %s.",
            ", ".join(unused),
        )


class Trainer(DefaultTrainer):
    """Train a model as a config describes it. SIGINT and SIGTERM end a run after the current step, which is saved.

    Attributes:
        average: the exponential moving average of the model, if ``SOLVER.EMA.ENABLED``, else None. It is what is evaluated
            and kept as the best.
    """

    iter: int

    def __init__(self, cfg):
        # Replaces DefaultTrainer.__init__, because it hard-codes SimpleTrainer/AMPTrainer and a CUDA device for DDP.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = resolve_epochs(self.auto_scale_workers(cfg, comm.get_world_size()))
        self.cfg = cfg
        model = self.build_model(cfg)
        freeze_unused_backbone(model)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.inner_model = model
        devices = [torch.cuda.current_device()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        model = create_ddp_model(model, device_ids=devices, **options)
        self._trainer = TrainStep(cfg, model, data_loader, optimizer)
        self.average = None
        checkpointables = {}
        if cfg.SOLVER.EMA.ENABLED:
            self.average = MovingAverage(self.inner_model, cfg.SOLVER.EMA.DECAY)
            checkpointables["average"] = self.average
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.description = describe_run(cfg)
        self.checkpointer = CheckedCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            complete=False,
            description=self.description,
            trainer=weakref.proxy(self),
            **checkpointables,
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.evaluation_missed = False
        self.earlier_metrics: dict[int, dict] = {}  # of a run that is resumed, by iteration
        for name in cfg.DATASETS.TEST:  # before training, so that no mistake in them comes to light hours later
            check_test_dataset(cfg, name, self.description["class_names"])
        build_evaluators(type(self), cfg, self.description["class_names"])
        import_trackers(cfg)
        self.register_hooks(self.build_hooks())

    @staticmethod
    def auto_scale_workers(cfg, num_workers: int):
        """Scale batch, rate and lengths as detectron2 does, and ``INPUT.AUGMENTATION_OFF_ITERS`` with the other lengths.

        Periods do not become 0, which would end checkpoints and evaluations.
        """
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:
            scaled.defrost()
            share = cfg.SOLVER.REFERENCE_WORLD_SIZE / num_workers
            scaled.INPUT.AUGMENTATION_OFF_ITERS = round(cfg.INPUT.AUGMENTATION_OFF_ITERS * share)
            scaled.SOLVER.CHECKPOINT_PERIOD = max(1, scaled.SOLVER.CHECKPOINT_PERIOD)
            scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, min(1, cfg.TEST.EVAL_PERIOD))
            if cfg.is_frozen():
                scaled.freeze()
        return scaled

    @property
    def evaluated_model(self) -> torch.nn.Module:
        return self.inner_model if self.average is None else self.average.module

    @classmethod
    def build_model(cls, cfg):
        model = build_detector(cfg)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return StoppableLoader(build_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        own_folder = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference", *own_folder))

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate as detectron2 does, in the precision that the config asks for."""
        with autocast(cfg, next(model.parameters()).device):
            return super().test(cfg, model, evaluators)

    def build_writers(self):
        """Return detectron2's writers (console, metrics.json, TensorBoard), and those of the trackers that the config names."""
        return [*super().build_writers(), *build_trackers(self.cfg)]

    def build_hooks(self):
        cfg = self.cfg
        # With several datasets, detectron2 names each result after its dataset. The first one decides.
        metric = "bbox/AP" if len(cfg.DATASETS.TEST) < 2 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"
        result = [IterationTimer(), LRScheduler(), WriteEpoch()]
        if self.average is not None:
            result.append(UpdateAverage())
        result.append(StopOnSignal())
        # Where both are due, the checkpoint comes before the evaluation.
        if comm.is_main_process():
            result.append(PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.DATASETS.TEST:
            result.append(Evaluate(cfg.TEST.EVAL_PERIOD, self._evaluate))
            if comm.is_main_process():
                best = CheckedCheckpointer(
                    self.evaluated_model, cfg.OUTPUT_DIR, complete=False, description=self.description
                )
                result.append(KeepBest(best, cfg.TEST.EVAL_PERIOD, metric))
            if cfg.SOLVER.PATIENCE and cfg.TEST.EVAL_PERIOD:
                keep_best = result[-1] if comm.is_main_process() else None
                result.append(StopEarly(cfg.SOLVER.PATIENCE, cfg.TEST.EVAL_PERIOD, keep_best))
        if comm.is_main_process():
            result.append(
                WriteMetrics(self.build_writers, cfg.OUTPUT_DIR, cfg.TEST.EVAL_PERIOD if cfg.DATASETS.TEST else 0)
            )
            if ProgressBar.is_wanted():
                result.append(ProgressBar(metric))
        return result

    def _evaluate(self) -> dict:
        if comm.get_world_size() > 1:
            # BatchNorm's statistics, if not frozen, differ between processes: use rank 0's, which the checkpoints hold.
            for buffer in self.evaluated_model.buffers():
                torch.distributed.broadcast(buffer, 0)
        try:
            evaluators = build_evaluators(type(self), self.cfg, self.description["class_names"])
            self._last_eval_results = self.test(self.cfg, self.evaluated_model, evaluators)
            write_results(self.cfg, self._last_eval_results, "evaluation.json", f"iteration {self.iter}")
        except StopRequested as stop:
            self.save_and_stop(stop.number)
        except Exception:  # such as an image that cannot be read: the steps since the last checkpoint are not lost
            with contextlib.suppress(Exception):
                self._save_last_step()
            raise
        return self._last_eval_results

    def _save_last_step(self) -> int:
        """Save a checkpoint to resume from, also in the evaluation after the last step; return its iteration."""
        self.iter = min(self.iter, self.max_iter - 1)
        if comm.is_main_process():
            self.checkpointer.save(f"model_{self.iter:07d}", iteration=self.iter)
        return self.iter

    def save_and_stop(self, number: int):
        """Save a checkpoint to resume from, and end this process.

        Args:
            number: of the signal that has asked for it.

        Raises:
            StopRequested: always.
        """
        ignore_signals()
        finished = self._save_last_step()
        comm.synchronize()  # launchers end the others when the first one ends
        logger.warning(
            "Stopped by %s after iteration %d of %d. Resume this run from OUTPUT_DIR %s.",
            *(signal.Signals(number).name, finished, self.max_iter, self.cfg.OUTPUT_DIR),
        )
        raise StopRequested(number)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer):
        """Build detectron2's scheduler, without the ``SOLVER.STEPS`` that come too late to have an effect."""
        # detectron2 leaves out steps after MAX_ITER, but one at MAX_ITER ends in an error.
        steps = tuple(step for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER)
        if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR" and steps != tuple(cfg.SOLVER.STEPS):
            logger.warning(
                "SOLVER.STEPS is %s: the learning rate does not fall at SOLVER.MAX_ITER (%d) or after it.",
                *(tuple(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER),
            )
            cfg = cfg.clone()
            cfg.defrost()
            cfg.SOLVER.STEPS = steps
        return super().build_lr_scheduler(cfg, optimizer)

    def train(self):
        """Train from ``start_iter`` to ``max_iter``; return the results of the last evaluation, if there was one.

        Raises:
            StopRequested: a signal has asked for it; the run can be resumed.
        """
        # Replaces TrainerBase.train, which logs a traceback of every error, also of those that are explained in a line.
        logger.info("Starting training from iteration %d", self.start_iter)
        logger.info("Losses and AP go to metrics.json, and to TensorBoard's files, in %s.", self.cfg.OUTPUT_DIR)
        with EventStorage(self.start_iter) as self.storage, catch_signals():
            self.iter = self.start_iter - 1  # the last finished step
            try:
                self.before_train()
                for self.iter in range(self.start_iter, self.max_iter):  # noqa: B020 (the hooks read it)
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    if self.iter + 1 >= self.max_iter:  # which may have become less
                        break
                if self.start_iter >= self.max_iter or self.max_iter < self.cfg.SOLVER.MAX_ITER:
                    self._complete_final_checkpoint()
                self.iter = self.max_iter  # by which the hooks know that the run is complete
            finally:
                self.after_train()
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            compare_with_expected(self.cfg, self._last_eval_results)
        return getattr(self, "_last_eval_results", None)

    def _complete_final_checkpoint(self) -> None:
        """Write ``model_final.pth`` for a run that ends early, or was complete when it was resumed, if it has no good one."""
        if not comm.is_main_process():
            return
        path, good = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth"), False
        if os.path.exists(path):
            try:
                final = Checkpoint.read(path, name="The final checkpoint")
                good = final.iteration is not None and final.iteration >= self.max_iter - 1
            except UserError as error:
                logger.warning("%s It is written again.", error)
        if not good:
            self.checkpointer.save("model_final", iteration=self.max_iter - 1)

    def after_train(self):
        self._trainer._data_loader_iter_obj = None  # ends the workers now, not at a later garbage collection
        super().after_train()

    def resume_or_load(self, resume=True):
        """Resume from the last checkpoint in OUTPUT_DIR, if ``resume`` and there is one; else start from MODEL.WEIGHTS.

        Raises:
            UserError: no checkpoint there can be read or resumed, it does not fit, or the processes find different ones.
        """
        checkpoint = self.checkpointer.read_last() if resume else None
        if len(set(comm.all_gather(checkpoint and os.path.basename(checkpoint.path)))) > 1:
            raise UserError(
                f"The processes find different checkpoints in OUTPUT_DIR {self.cfg.OUTPUT_DIR}: it must be one folder that "
                "all machines share."
            )
        others = sorted(path.name for path in Path(self.cfg.OUTPUT_DIR).glob("model_*.pth"))
        if resume and checkpoint is None and others:
            raise UserError(
                f"OUTPUT_DIR {self.cfg.OUTPUT_DIR} holds {', '.join(others[:5])}, but no checkpoint from which training can go "
                "on: name one in MODEL.WEIGHTS, and another OUTPUT_DIR."
            )
        self.checkpointer.complete = checkpoint is not None
        if checkpoint is not None:
            self._check_resumable(checkpoint)
            self.checkpointer.load(checkpoint)
            self.start_iter = self.iter + 1  # the checkpoint holds the last finished iteration
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if self.average is not None and self.average.n_averaged == 0:  # the checkpoint has none
            self.average.module.load_state_dict(self.inner_model.state_dict())
        self.data_loader.start = self.start_iter
        if comm.is_main_process():
            if checkpoint is None:
                set_metrics_aside(self.cfg.OUTPUT_DIR)
            else:
                self._go_on_with_metrics()
        self.evaluation_missed = comm.all_gather(self.evaluation_missed)[0]

    def _go_on_with_metrics(self) -> None:
        """Remove the metrics that are computed again, and find out whether the last evaluation is among the others."""
        step = self.start_iter - 1
        kept = keep_metrics_before(self.cfg.OUTPUT_DIR, self.start_iter, complete=self.start_iter >= self.max_iter)
        period = self.cfg.TEST.EVAL_PERIOD if self.cfg.DATASETS.TEST else 0
        due = self.start_iter < self.max_iter and period > 0 and self.start_iter % period == 0
        self.evaluation_missed = due and not any("/AP" in key for key in kept.get(step, {}))
        self.earlier_metrics = kept

    def _check_resumable(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.entries.get("trainer")
        if state is None:
            raise UserError(
                f"{checkpoint.path} holds no training state, as model_best.pth does not, so that training cannot go on from "
                "it: take it out of OUTPUT_DIR, or name it in MODEL.WEIGHTS and another OUTPUT_DIR."
            )
        if checkpoint.iteration is not None and state.get("iteration") != checkpoint.iteration:
            raise UserError(
                f"{checkpoint.path} is damaged: it is of iteration {checkpoint.iteration}, but its training state of "
                f"{state.get('iteration')}. Take it out of OUTPUT_DIR."
            )
        if checkpoint.iteration is not None and checkpoint.iteration >= self.max_iter:
            raise UserError(
                f"SOLVER.MAX_ITER is {self.max_iter}, but {checkpoint.path} has {checkpoint.iteration + 1} steps already: "
                "raise it, or name another OUTPUT_DIR."
            )
        earlier, now = checkpoint.class_names, self.description["class_names"]
        if earlier is not None and now is not None and earlier != now:
            index = next((i for i, (a, b) in enumerate(zip(earlier, now)) if a != b), min(len(earlier), len(now)))
            raise UserError(
                f"{checkpoint.path} was trained on other classes, or in another order, than DATASETS.TRAIN has now (class "
                f"{index} differs): resume with the data that it was trained on, or name it in MODEL.WEIGHTS and another "
                "OUTPUT_DIR."
            )

    def state_dict(self):
        return {**super().state_dict(), "seed": self.data_loader.seed, "settings": self._settings()}

    def _settings(self) -> dict:
        """Return the keys whose values a resumed run takes from its checkpoint, or that change how it continues."""
        solver = self.cfg.SOLVER
        return {
            "SOLVER.OPTIMIZER": solver.OPTIMIZER,
            "SOLVER.BASE_LR": solver.BASE_LR,
            "SOLVER.BACKBONE_MULTIPLIER": solver.BACKBONE_MULTIPLIER,
            "SOLVER.WEIGHT_DECAY": solver.WEIGHT_DECAY,
            "SOLVER.IMS_PER_BATCH": solver.IMS_PER_BATCH,
            "DATASETS.TRAIN": list(self.cfg.DATASETS.TRAIN),
            "SEED": self.cfg.SEED,
        }

    def load_state_dict(self, state_dict):
        if "settings" not in state_dict:
            raise UserError(
                f"The checkpoint in OUTPUT_DIR {self.cfg.OUTPUT_DIR} was written by another trainer and cannot be "
                "resumed here: name it in MODEL.WEIGHTS and another OUTPUT_DIR."
            )
        for key in ("iteration", "seed"):
            if type(state_dict.get(key)) is not int or state_dict[key] < 0:
                raise ValueError(f"its {key} is {state_dict.get(key)!r}")
        optimizer = state_dict["settings"].get("SOLVER.OPTIMIZER", "AdamW")
        if optimizer != self.cfg.SOLVER.OPTIMIZER:
            raise UserError(
                f"SOLVER.OPTIMIZER is {self.cfg.SOLVER.OPTIMIZER!r}, but the checkpoint in OUTPUT_DIR {self.cfg.OUTPUT_DIR} "
                f"was trained with {optimizer!r}: resume with that, or name the checkpoint in MODEL.WEIGHTS and another "
                "OUTPUT_DIR."
            )
        super().load_state_dict(state_dict)
        for key, value in self._settings().items():
            earlier = state_dict["settings"].get(key, value)
            if earlier != value:
                logger.warning(
                    "%s was %s when this checkpoint was written and is now %s. A resumed run keeps its learning rates, weight "
                    "decay and seed; to use others, start a new OUTPUT_DIR with MODEL.WEIGHTS.",
                    *(key, earlier, value),
                )
        self.data_loader.seed = state_dict["seed"]


def check_test_dataset(cfg, name: str, class_names: list[str] | None) -> None:
    """Read a dataset that a model is to be evaluated on, and warn of what it cannot find there.

    Raises:
        UserError: the dataset cannot be used, or has other classes.
    """
    warn_about_capacity(cfg, name, load_records(name, class_names), training=False)


def build_evaluators(trainer_class: type[Trainer], cfg, class_names: list[str] | None) -> list[DatasetEvaluator]:
    """Build an evaluator for each of ``DATASETS.TEST``, for a model with these classes (None: in the dataset's own order)."""
    evaluators = [trainer_class.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
    for evaluator in evaluators:
        if class_names is not None and isinstance(evaluator, CheckedEvaluator):
            evaluator.use_classes(class_names)
    return evaluators


def evaluate(cfg) -> dict:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; with ``SOLVER.EMA.ENABLED``, the averaged weights in it.

    The classes of the datasets are matched by name with those of the checkpoint or, if it does not say, of ``DATASETS.TRAIN``.

    Raises:
        UserError: the checkpoint or a dataset cannot be used, or they have different classes.
    """
    checkpoint = Checkpoint.read_local(cfg.MODEL.WEIGHTS)
    class_names = checkpoint.class_names if checkpoint else None
    if class_names is None:
        class_names, _ = classes_by_index(cfg.DATASETS.TRAIN, number_of_classes(cfg)[1])
    if class_names is None and cfg.MODEL.WEIGHTS:
        logger.warning(
            "%s does not say which classes it has, and DATASETS.TRAIN neither: the order of the classes is taken to be that of "
            "DATASETS.TEST.",
            cfg.MODEL.WEIGHTS,
        )
    for name in cfg.DATASETS.TEST:
        check_test_dataset(cfg, name, class_names)
    model = Trainer.build_model(cfg)
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: evaluating RANDOM weights. Name a checkpoint: MODEL.WEIGHTS PATH.")
    checkpointer = CheckedCheckpointer(model, complete=True, use_average=cfg.SOLVER.EMA.ENABLED)
    checkpointer.load(checkpoint or cfg.MODEL.WEIGHTS)
    with catch_signals():
        results = Trainer.test(cfg, model, build_evaluators(Trainer, cfg, class_names))
    if comm.is_main_process():
        stem = os.path.splitext(os.path.basename(cfg.MODEL.WEIGHTS))[0] or "random_weights"
        write_results(cfg, results, f"evaluation_{stem}.json", cfg.MODEL.WEIGHTS)
        compare_with_expected(cfg, results)
    return results


def compare_with_expected(cfg, results: dict) -> None:
    """End the program with status 1, if the results of an evaluation are not those of ``TEST.EXPECTED_RESULTS``.

    Raises:
        UserError: there is no AP to compare.
    """
    if cfg.TEST.EXPECTED_RESULTS and not results.get("bbox"):
        raise UserError(
            f"TEST.EXPECTED_RESULTS: {cfg.DATASETS.TEST[0]} has no annotated objects, and so no AP to compare."
        )
    verify_results(cfg, results)
