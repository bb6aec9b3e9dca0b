from .common.models import use_denoising, use_smca, use_three_levels
from .sam_detr_R_50_1x import dataloader, lr_multiplier, model, optimizer, train

use_three_levels(model)
use_smca(model)
use_denoising(model)
train.output_dir = "output/lazy/sam_detr_pp_smca_dn_R_50_1x"
