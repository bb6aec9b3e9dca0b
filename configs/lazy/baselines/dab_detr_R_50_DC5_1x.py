from ..common.models import make_dab_detr
from ..sam_detr_R_50_DC5_1x import dataloader, lr_multiplier, model, optimizer, train

make_dab_detr(model)
train.output_dir = "output/lazy/dab_detr_R_50_DC5_1x"
