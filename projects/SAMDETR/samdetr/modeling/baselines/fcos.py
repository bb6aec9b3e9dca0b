"""Build detectron2's FCOS from a YAML config; detectron2 itself offers it to Python configs only.

It reads RetinaNet's keys: ``MODEL.RETINANET.NUM_CLASSES``, ``IN_FEATURES``, ``NUM_CONVS``, ``PRIOR_PROB``,
``FOCAL_LOSS_ALPHA``, ``FOCAL_LOSS_GAMMA``, ``TOPK_CANDIDATES_TEST``, ``SCORE_THRESH_TEST`` and ``NMS_THRESH_TEST``.
"""

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelP6P7
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead

__all__ = ["build_fcos", "build_fcos_resnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with an FPN whose two further levels come from p5, not from res5 as RetinaNet's do."""
    width = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=width,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(width, width, in_feature="p5"),
    )


@META_ARCH_REGISTRY.register()
def build_fcos(cfg) -> FCOS:
    """Build FCOS with detectron2's defaults: GroupNorm in the head, centre sampling, GIoU loss."""
    node = cfg.MODEL.RETINANET
    backbone = build_backbone(cfg)
    shapes = [backbone.output_shape()[name] for name in node.IN_FEATURES]
    head = FCOSHead(
        input_shape=shapes,
        num_classes=node.NUM_CLASSES,
        conv_dims=[shapes[0].channels] * node.NUM_CONVS,
        prior_prob=node.PRIOR_PROB,
        norm="GN",
    )
    return FCOS(
        backbone=backbone,
        head=head,
        head_in_features=list(node.IN_FEATURES),
        num_classes=node.NUM_CLASSES,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        pixel_mean=cfg.MODEL.PIXEL_MEAN,
        pixel_std=cfg.MODEL.PIXEL_STD,
    )
