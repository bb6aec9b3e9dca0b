from ..common.models import use_denoising
from .dab_detr_R_50_DC5_1x import dataloader, lr_multiplier, model, optimizer, train

use_denoising(model)
train.output_dir = "output/lazy/dn_detr_R_50_DC5_1x"
