"""detectron2's trainer with this project's data, optimizer, steps and checkpoints."""

import logging
import math
import os
import weakref

import torch
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import CheckedCheckpointer, Checkpoint, describe_run
from ..data import build_test_loader, build_train_loader
from ..errors import UserError
from ..solver import autocast, build_optimizer
from .evaluation import build_evaluator, write_results
from .train_step import TrainStep

__all__ = ["Trainer", "evaluate"]

logger = logging.getLogger(__name__)


class KeepBest(HookBase):
    """Keep the evaluated weights with the best AP in ``model_best.pth``, with that AP, which a resumed run reads from there.

    This hook comes after the evaluation. Unlike detectron2's BestCheckpointer, it does not forget the best when a run is
    resumed, and does not mark its file as the one to resume from.
    """

    def __init__(self, checkpointer: CheckedCheckpointer, period: int, metric: str):
        self.checkpointer = checkpointer
        self.period = period
        self.metric = metric
        self.best = -math.inf

    def before_train(self):
        path = os.path.join(self.checkpointer.save_dir, "model_best.pth")
        if self.trainer.start_iter > 0 and PathManager.isfile(path):
            try:
                metric = Checkpoint.read(path, name="The best checkpoint").metric
                self.best = -math.inf if metric is None else metric
            except UserError as error:
                logger.error("%s The next evaluation replaces it.", error)

    def after_step(self):
        next_iter = self.trainer.iter + 1
        if self.period > 0 and next_iter % self.period == 0 and next_iter != self.trainer.max_iter:
            self._keep()

    def after_train(self):
        if self.trainer.iter + 1 >= self.trainer.max_iter:
            self._keep()

    def _keep(self):
        value, iteration = self.trainer.storage.latest().get(self.metric, (math.nan, -1))
        if value > self.best:  # never true of NaN
            self.best = value
            self.checkpointer.save("model_best", iteration=iteration, metric=value, tag=False)
            logger.info("Best %s so far, %.2f at iteration %d: kept in model_best.pth.", self.metric, value, iteration)


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


class WriteEpoch(HookBase):
    """Write the epoch, the number of passes over the images so far, beside the other metrics."""

    def after_step(self):
        epoch = self.trainer.data_loader.epoch(self.trainer.iter + 1)
        self.trainer.storage.put_scalar("epoch", epoch, smoothing_hint=False)


class UpdateAverage(HookBase):
    """Update the exponential moving average of the weights after each step."""

    def after_step(self):
        self.trainer.average.update_parameters(self.trainer.inner_model)


class Trainer(DefaultTrainer):
    """Train a model as a config describes it.

    Attributes:
        average: the exponential moving average of the model, if ``SOLVER.EMA.ENABLED``, else None. It is what is evaluated
            and kept as the best.
    """

    def __init__(self, cfg):
        # Replaces DefaultTrainer.__init__, because it hard-codes SimpleTrainer/AMPTrainer and a CUDA device for DDP.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        model = self.build_model(cfg)
        freeze_unused_backbone(model)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        self.inner_model = model
        devices = [torch.cuda.current_device()] if cfg.MODEL.DEVICE.startswith("cuda") else None
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=devices)
        self._trainer = TrainStep(cfg, model, data_loader, optimizer)
        self.average = None
        checkpointables = {}
        if cfg.SOLVER.EMA.ENABLED:
            self.average = AveragedModel(self.inner_model, multi_avg_fn=get_ema_multi_avg_fn(cfg.SOLVER.EMA.DECAY))
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
        self.register_hooks(self.build_hooks())

    @property
    def evaluated_model(self) -> torch.nn.Module:
        return self.inner_model if self.average is None else self.average.module

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return build_evaluator(cfg, dataset_name, os.path.join(cfg.OUTPUT_DIR, "inference"))

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        """Evaluate as detectron2 does, in the precision that the config asks for."""
        with autocast(cfg, next(model.parameters()).device):
            return super().test(cfg, model, evaluators)

    def build_hooks(self):
        cfg = self.cfg
        result = [hooks.IterationTimer(), hooks.LRScheduler(), WriteEpoch()]
        if self.average is not None:
            result.append(UpdateAverage())
        # The checkpoint comes before the evaluation, so that a failure there loses nothing.
        if comm.is_main_process():
            result.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        if cfg.DATASETS.TEST:
            result.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate))
            if comm.is_main_process():
                best = CheckedCheckpointer(
                    self.evaluated_model, cfg.OUTPUT_DIR, complete=False, description=self.description
                )
                # With several datasets, detectron2 names each result after its dataset. The first one decides.
                metric = "bbox/AP" if len(cfg.DATASETS.TEST) == 1 else f"{cfg.DATASETS.TEST[0]}/bbox/AP"
                result.append(KeepBest(best, cfg.TEST.EVAL_PERIOD, metric))
        if comm.is_main_process():
            result.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return result

    def _evaluate(self) -> dict:
        if comm.get_world_size() > 1:
            # BatchNorm's statistics, if not frozen, differ between processes: use rank 0's, which the checkpoints hold.
            for buffer in self.evaluated_model.buffers():
                torch.distributed.broadcast(buffer, 0)
        self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        write_results(self.cfg, self._last_eval_results, "evaluation.json", f"iteration {self.iter}")
        return self._last_eval_results

    def after_train(self):
        super().after_train()
        self._trainer._data_loader_iter_obj = None  # ends the workers now, not at a later garbage collection

    def resume_or_load(self, resume=True):
        """Resume from the last checkpoint in OUTPUT_DIR, if ``resume`` and there is one; else start from MODEL.WEIGHTS.

        Raises:
            UserError: no checkpoint there can be read, it does not fit, or the processes find different ones.
        """
        checkpoint = self.checkpointer.read_last() if resume else None
        if len(set(comm.all_gather(checkpoint and os.path.basename(checkpoint.path)))) > 1:
            raise UserError(
                f"The processes find different checkpoints in OUTPUT_DIR {self.cfg.OUTPUT_DIR}: it must be one folder that "
                "all machines share."
            )
        self.checkpointer.complete = checkpoint is not None
        if checkpoint is not None:
            self.checkpointer.load(checkpoint)
            self.start_iter = self.iter + 1  # the checkpoint holds the last finished iteration
        else:
            self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        self.data_loader.start = self.start_iter

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


def evaluate(cfg) -> dict:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; with ``SOLVER.EMA.ENABLED``, the averaged weights in it."""
    model = Trainer.build_model(cfg)
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: evaluating RANDOM weights. Name a checkpoint: MODEL.WEIGHTS PATH.")
    CheckedCheckpointer(model, complete=True, use_average=cfg.SOLVER.EMA.ENABLED).load(cfg.MODEL.WEIGHTS)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        stem = os.path.splitext(os.path.basename(cfg.MODEL.WEIGHTS))[0] or "random_weights"
        write_results(cfg, results, f"evaluation_{stem}.json", cfg.MODEL.WEIGHTS)
        verify_results(cfg, results)
    return results
