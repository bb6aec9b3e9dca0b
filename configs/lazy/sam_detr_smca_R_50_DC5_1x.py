from .common.models import use_smca
from .sam_detr_R_50_DC5_1x import dataloader, lr_multiplier, model, optimizer, train

use_smca(model)
train.output_dir = "output/lazy/sam_detr_smca_R_50_DC5_1x"
