from .common.coco import dataloader
from .common.models import model, use_three_levels
from .common.schedule import lr_multiplier, optimizer, train

use_three_levels(model)
train.output_dir = "output/lazy/sam_detr_pp_R_50_1x"
