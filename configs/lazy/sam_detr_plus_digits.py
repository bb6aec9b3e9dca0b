"""configs/sam_detr_plus_digits.yaml as a Python config."""

from .common.models import use_denoising, use_dense_head, use_encoder_selection
from .common.schedule import multi_step
from .sam_detr_digits import dataloader, model, optimizer, train

use_denoising(model)
use_encoder_selection(model, anchor_size=0.3)
use_dense_head(model, anchor_size=0.3)
dataloader.train.total_batch_size = 8
optimizer.lr = 0.001
lr_multiplier = multi_step(3200, 2700, warmup_iters=50, warmup_factor=0.01)
train.update(max_iter=3200, eval_period=800, output_dir="output/lazy/sam_detr_plus_digits")
train.checkpointer.period = 800
