from ..common.models import make_conditional_detr
from ..sam_detr_R_50_1x import dataloader, lr_multiplier, model, optimizer, train

make_conditional_detr(model)
train.output_dir = "output/lazy/conditional_detr_R_50_1x"
