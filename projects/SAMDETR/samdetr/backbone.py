"""Backbones that detectron2 does not have: a small ResNet for small data.

The COCO models use detectron2's own ``build_resnet_backbone``.
"""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

__all__ = ["build_mini_resnet_backbone"]


@BACKBONE_REGISTRY.register()
def build_mini_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """A ResNet with one basic block a stage, small enough to train from scratch on a CPU.

    It reads ``MODEL.RESNETS.STEM_OUT_CHANNELS``, ``RES2_OUT_CHANNELS`` (doubled by each further stage), ``NORM`` and
    ``OUT_FEATURES``, and ``MODEL.BACKBONE.FREEZE_AT``.
    """
    node = cfg.MODEL.RESNETS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages = []
    channels, out_channels = node.STEM_OUT_CHANNELS, node.RES2_OUT_CHANNELS
    for stride in (1, 2, 2, 2):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                1,
                stride_per_block=[stride],
                in_channels=channels,
                out_channels=out_channels,
                norm=node.NORM,
            )
        )
        channels, out_channels = out_channels, 2 * out_channels
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
