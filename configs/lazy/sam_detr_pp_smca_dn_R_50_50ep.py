from .common.models import use_denoising
from .sam_detr_pp_smca_R_50_50ep import dataloader, lr_multiplier, model, optimizer, train

use_denoising(model)
train.output_dir = "output/lazy/sam_detr_pp_smca_dn_R_50_50ep"
