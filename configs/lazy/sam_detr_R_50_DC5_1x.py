from .common.coco import dataloader
from .common.models import model, use_dc5
from .common.schedule import optimizer, train, train_8_images_a_step

use_dc5(model)
lr_multiplier = train_8_images_a_step(dataloader, train)
train.output_dir = "output/lazy/sam_detr_R_50_DC5_1x"
