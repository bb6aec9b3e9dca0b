from ..common.models import make_detr
from ..sam_detr_R_50_DC5_1x import dataloader, lr_multiplier, model, optimizer, train

make_detr(model)
train.output_dir = "output/lazy/detr_R_50_DC5_1x"
