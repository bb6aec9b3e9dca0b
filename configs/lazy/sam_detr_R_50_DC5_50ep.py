from .common.models import use_no_projection_norm
from .common.schedule import train_50_epochs
from .sam_detr_R_50_DC5_1x import dataloader, model, optimizer, train

use_no_projection_norm(model)  # as published
lr_multiplier = train_50_epochs(train)
train.output_dir = "output/lazy/sam_detr_R_50_DC5_50ep"
