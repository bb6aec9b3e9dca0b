from ..common.models import make_smca_detr
from ..sam_detr_R_50_1x import dataloader, lr_multiplier, model, optimizer, train

make_smca_detr(model)
train.output_dir = "output/lazy/smca_detr_R_50_1x"
