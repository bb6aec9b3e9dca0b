from ..common.models import make_conditional
from ..sam_detr_R_50_1x import dataloader, lr_multiplier, model, optimizer, train

make_conditional(model)
train.output_dir = "output/lazy/conditional_R_50_1x"
