"""Backbones that detectron2 does not have: DC5 by torchvision's rule, and a small ResNet for small data.

The other COCO models use detectron2's own ``build_resnet_backbone``. All of them run faster with their frozen norms folded
into the convolutions and their features in channels-last order.
"""

import contextlib

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet, build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from .errors import UserError
from .layers import is_tracing

__all__ = ["FoldedConv2d", "build_mini_resnet_backbone", "build_resnet_dc5_backbone", "optimize_backbone"]


class FoldedConv2d(Conv2d):
    """detectron2's convolution with a frozen BatchNorm, which scales the weights here and not each pixel.

    The same function of the same parameters and buffers, under the same names, up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W'): convolution, norm, activation."""
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        scale = scale.view(-1, 1, 1, 1)
        weight = self.weight * scale
        recomputed = contextlib.nullcontext() if is_tracing() else self._recomputed(weight, scale)
        with recomputed:
            x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _recomputed(self, weight: Tensor, scale: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        """Scale the weights again in the backward pass, so that there is no second copy of them all in between."""
        address = weight.data_ptr()  # not the tensor, since autograd keeps these functions

        def pack(saved: Tensor) -> Tensor | None:
            return None if saved.data_ptr() == address else saved

        def unpack(saved: Tensor | None) -> Tensor:
            return self.weight.detach() * scale if saved is None else saved

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def optimize_backbone(backbone: nn.Module) -> nn.Module:
    """Fold every frozen norm behind one of detectron2's convolutions, and lay weights out channels-last; in place."""
    for module in backbone.modules():
        # Not a new module: a ResNet refers to its modules from several places, and this one changes its forward pass only.
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = FoldedConv2d
    with torch.no_grad():
        return backbone.to(memory_format=torch.channels_last)


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """detectron2's ResNet with res5 at stride 16: its first block has dilation 1, the others 2 (torchvision's rule).

    detectron2's own ``RES5_DILATION`` of 2 dilates the first block, too, and so fits other weights.

    Raises:
        ValueError: ``MODEL.RESNETS.RES5_DILATION`` is not 2.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 2:
        raise UserError(
            f"MODEL.RESNETS.RES5_DILATION is {cfg.MODEL.RESNETS.RES5_DILATION}: build_resnet_dc5_backbone needs 2."
        )
    resnet = build_resnet_backbone(cfg, input_shape)
    for module in resnet.res5[0].modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.dilation = module.padding = (1, 1)
    return resnet


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
