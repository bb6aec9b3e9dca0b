#!/usr/bin/env python
"""Train and evaluate SAM-DETR++ with detectron2.

./train_net.py --config-file configs/sam_detr_smca_R_50_1x.yaml --num-gpus 8
./train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS CHECKPOINT
./train_net.py --config-file CONFIG --resume
"""

import logging
import os
import sys
import weakref

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

import samdetr
from samdetr.checkpoint import CheckedCheckpointer
from samdetr.checks import UserError, check_config, merge_options
from samdetr.data import build_test_loader, build_train_loader
from samdetr.solver import build_optimizer

logger = logging.getLogger("detectron2")


class WeightsCheckpointer(DetectionCheckpointer):
    """Saves the model alone, and leaves the mark of the last checkpoint, which resuming starts from, where it is."""

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestCheckpointer(hooks.BestCheckpointer):
    """detectron2's, which also remembers the best result when training is resumed."""

    def state_dict(self) -> dict:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]


class Trainer(DefaultTrainer):
    """detectron2's trainer with this project's optimizer, data and checkpoints."""

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
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))

    def resume_or_load(self, resume=True):
        resuming = resume and self.checkpointer.has_checkpoint()
        self.checkpointer = CheckedCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, complete=resuming, trainer=weakref.proxy(self)
        )
        super().resume_or_load(resume)

    def build_hooks(self):
        result = super().build_hooks()
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            # After the evaluation and before the writers, which come last.
            checkpointer = WeightsCheckpointer(self.model, self.cfg.OUTPUT_DIR)
            result.insert(-1, BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, checkpointer, "bbox/AP"))
        return result


def setup(args):
    """Read and check the config."""
    cfg = get_cfg()
    samdetr.add_samdetr_config(cfg)
    merge_options(cfg, args.config_file, args.opts)
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("MODEL.DEVICE is cuda, but there is no CUDA device here: using the CPU.")
    # Attention's smallest probabilities are denormal numbers, which CPUs multiply many times slower than zeros.
    torch.set_flush_denormal(True)
    if torch.cuda.device_count() < args.num_gpus > 1:
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()} CUDA devices."
        )
    cfg.freeze()
    check_config(cfg, training=not args.eval_only)
    resumable = os.path.exists(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if resumable and not (args.resume or args.eval_only):
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds the checkpoints of an earlier run: continue it with --resume, or name "
            "another OUTPUT_DIR."
        )
    default_setup(cfg, args)
    return cfg


def evaluate(cfg) -> dict:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST``."""
    model = Trainer.build_model(cfg)
    if not cfg.MODEL.WEIGHTS:
        logger.warning("MODEL.WEIGHTS is empty: evaluating RANDOM weights. Name a checkpoint: MODEL.WEIGHTS PATH.")
    CheckedCheckpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args):
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    arguments = default_argument_parser().parse_args()
    try:
        launch(
            main,
            arguments.num_gpus,
            num_machines=arguments.num_machines,
            machine_rank=arguments.machine_rank,
            dist_url=arguments.dist_url,
            args=(arguments,),
        )
    except UserError as error:
        sys.exit(f"error: {error}")
