"""configs/sam_detr_digits.yaml as a Python config: trains on two CPU cores."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

from samdetr.modeling.backbone import make_mini_stages

from .common.coco import dataloader
from .common.models import make_small, model, use_smca
from .common.schedule import multi_step, optimizer, train

model.backbone.stem.update(out_channels=32, norm="BN")
model.backbone.stages = L(make_mini_stages)(in_channels=32, out_channels=32, norm="BN")
model.backbone.freeze_at = 0
model.in_features = ["res3"]
model.feature_projection.update(in_channels=[64], strides=[8])
make_small(model, dim=96, num_heads=4, num_queries=30)
model.num_classes = 10
use_smca(model)

resize = L(T.ResizeShortestEdge)(short_edge_length=[128, 128], max_size=128, sample_style="choice")
dataloader.train.dataset.name = "digits_train"
dataloader.train.mapper.augmentations = [resize]  # no flip: a mirrored 2 is no 2
dataloader.train.num_workers = 2
dataloader.test.dataset.name = "digits_val"
dataloader.test.mapper.augmentations = [resize]
dataloader.test.num_workers = 2

optimizer.lr = 0.0007
optimizer.params.lr_factor_func = None
lr_multiplier = multi_step(1600, 1300, warmup_iters=50, warmup_factor=0.01)
train.update(max_iter=1600, eval_period=400, init_checkpoint="", device="cpu", output_dir="output/lazy/sam_detr_digits")
train.checkpointer.period = 400
