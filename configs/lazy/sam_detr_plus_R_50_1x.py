from .common.models import use_dense_head, use_encoder_selection
from .sam_detr_pp_smca_dn_R_50_1x import dataloader, lr_multiplier, model, optimizer, train

use_encoder_selection(model)
model.query_generator.with_negatives = True
model.decoder.look_forward_twice = True
use_dense_head(model)
train.output_dir = "output/lazy/sam_detr_plus_R_50_1x"
