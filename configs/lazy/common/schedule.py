"""Optimizer, learning rates, and what detectron2's ``lazyconfig_train_net.py`` needs to know about a run."""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from samdetr.solver import FullModelClippingAdamW, backbone_lr_factor

optimizer = L(FullModelClippingAdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", lr_factor_func=partial(backbone_lr_factor, multiplier=0.1)
    ),
    lr=1e-4,
    weight_decay=1e-4,
    max_norm=0.1,
    fused=True,
)


def multi_step(max_iter: int, milestone: int, warmup_iters: int = 10, warmup_factor: float = 1.0):
    """Make a schedule whose learning rate falls to a tenth once."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[milestone, max_iter]),
        warmup_factor=warmup_factor,
        warmup_length=warmup_iters / max_iter,
    )


lr_multiplier = multi_step(90000, 75000)  # 1x

train = dict(
    output_dir="./output",
    init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
    max_iter=90000,
    amp=dict(enabled=False),
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=None),
    eval_period=7500,  # one epoch
    log_period=20,
    device="cuda",
)


def train_50_epochs(train):
    """Set the length of the run, in place, and return the learning rates."""
    train.max_iter = train.max_iter * 25 // 6
    return multi_step(train.max_iter, train.max_iter * 4 // 5)


def train_8_images_per_step(dataloader, train):
    """Train with half the images per step for twice the steps, as the DC5 models do, in place; return the learning rates."""
    dataloader.train.total_batch_size = 8
    train.max_iter *= 2
    train.eval_period *= 2
    train.checkpointer.period *= 2
    return multi_step(train.max_iter, train.max_iter * 5 // 6)
