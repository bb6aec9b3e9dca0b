from .common.schedule import train_50_epochs
from .sam_detr_plus_R_50_1x import dataloader, model, optimizer, train

lr_multiplier = train_50_epochs(train)
train.output_dir = "output/lazy/sam_detr_plus_R_50_50ep"
