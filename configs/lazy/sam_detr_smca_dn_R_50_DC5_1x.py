from .common.coco import dataloader
from .common.models import model, use_dc5, use_denoising, use_smca
from .common.schedule import optimizer, train, train_8_images_per_step

use_dc5(model)
use_smca(model)
use_denoising(model)
lr_multiplier = train_8_images_per_step(dataloader, train)
train.output_dir = "output/lazy/sam_detr_smca_dn_R_50_DC5_1x"
