"""COCO with DETR's augmentation, as ``samdetr.data.dataset_mapper`` builds it from a YAML config."""

import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import DatasetMapper, build_detection_test_loader, build_detection_train_loader
from omegaconf import OmegaConf

from samdetr.data import load_records
from samdetr.engine.evaluation import CheckedEvaluator

dataloader = OmegaConf.create()

dataloader.train = L(build_detection_train_loader)(
    # Images without boxes teach what is background.
    dataset=L(load_records)(name="coco_2017_train", training=True),
    mapper=L(DatasetMapper)(
        is_train=True,
        augmentations=[
            L(T.RandomFlip)(),
            L(T.RandomApply)(
                tfm_or_aug=L(T.AugmentationList)(
                    augs=[
                        L(T.ResizeShortestEdge)(short_edge_length=[400, 500, 600], sample_style="choice"),
                        L(T.RandomCrop)(crop_type="absolute_range", crop_size=[384, 600]),
                    ]
                ),
                prob=0.5,
            ),
            L(T.ResizeShortestEdge)(short_edge_length=list(range(480, 801, 32)), max_size=1333, sample_style="choice"),
        ],
        image_format="RGB",
    ),
    total_batch_size=16,
    num_workers=4,
)

dataloader.test = L(build_detection_test_loader)(
    dataset=L(load_records)(name="coco_2017_val"),
    mapper=L(DatasetMapper)(
        is_train=False,
        augmentations=[L(T.ResizeShortestEdge)(short_edge_length=[800, 800], max_size=1333)],
        image_format="${...train.mapper.image_format}",
    ),
    num_workers=4,
)

dataloader.evaluator = L(CheckedEvaluator)(dataset_name="${..test.dataset.name}")
