from .common.coco import dataloader
from .common.models import model
from .common.schedule import lr_multiplier, optimizer, train

train.output_dir = "output/lazy/sam_detr_R_50_1x"
