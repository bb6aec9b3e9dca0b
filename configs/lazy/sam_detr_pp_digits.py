"""configs/sam_detr_pp_digits.yaml as a Python config."""

from .common.models import use_deformable_encoder, use_denoising
from .sam_detr_digits import dataloader, lr_multiplier, model, optimizer, train

model.in_features = ["res3", "res4", "res5"]
model.feature_projection.update(in_channels=[64, 128, 256], strides=[8, 16, 32])
use_deformable_encoder(model, feedforward_dim=256)
use_denoising(model)
train.output_dir = "output/lazy/sam_detr_pp_digits"
