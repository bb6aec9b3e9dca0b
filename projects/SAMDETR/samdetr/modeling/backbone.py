"""Backbones that detectron2 does not have: DC5 by torchvision's rule, and a small ResNet for small data.

The other COCO models use detectron2's own ``build_resnet_backbone``. Every backbone is optimised: frozen norms are folded
into the convolutions, and weights are laid out channels-last.
"""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet, build_resnet_backbone
from torch import Tensor, nn

from ..errors import UserError
from ..ops.folded_conv import folded_conv2d
from ..ops.runtime import is_tracing

__all__ = [
    "FoldedConv2d",
    "build_mini_resnet_backbone",
    "build_mini_resnet_fpn_backbone",
    "build_resnet_dc5_backbone",
    "make_dc5_stages",
    "make_mini_stages",
    "optimize_backbone",
]


class FoldedConv2d(Conv2d):
    """detectron2's convolution with a frozen BatchNorm that scales the weights instead of every pixel.

    It is the same function of the same parameters and buffers, under the same names, up to rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W'): convolution, norm, activation."""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):  # the norm was replaced later
            return super().forward(x)
        scale, shift = self._scale_and_shift(norm)
        if self.bias is not None:
            shift = shift + self.bias * scale
        x = folded_conv2d(x, self.weight, scale, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def __getstate__(self) -> dict:
        """Return what is copied and pickled: not what is kept, because a copy's buffers count their changes from 0."""
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}

    def _scale_and_shift(self, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
        """Return the norm's scale and shift, (C_out,), which are kept until its buffers change (other than by ``.data``)."""
        buffers = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        # What is made while tracing or in inference mode cannot be used elsewhere, and torch does not count its changes.
        inference = torch.is_inference_mode_enabled() or any(buffer.is_inference() for buffer in buffers)
        if is_tracing() or inference:
            return _scale_and_shift(*buffers, norm.eps)
        state = [(buffer, buffer._version) for buffer in buffers]
        kept = self.__dict__.get("_kept")
        if kept is None or any(a is not c or b != d for (a, b), (c, d) in zip(kept[0], state)):
            kept = self._kept = state, _scale_and_shift(*buffers, norm.eps)
        return kept[1]


@torch.no_grad()
def _scale_and_shift(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale = weight * (variance + eps).rsqrt()
    return scale, bias - mean * scale


def optimize_backbone(backbone: nn.Module) -> nn.Module:
    """Fold every frozen norm that follows a convolution of detectron2's, and lay weights out channels-last; in place."""
    for module in backbone.modules():
        # Changing the class keeps the module: a ResNet refers to it from several places, and only its forward pass differs.
        if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
            module.__class__ = FoldedConv2d
    with torch.no_grad():
        return backbone.to(memory_format=torch.channels_last)


@BACKBONE_REGISTRY.register()
def build_resnet_dc5_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build detectron2's ResNet with res5 at stride 16: its first block has dilation 1, the others 2 (torchvision's rule).

    detectron2's own ``RES5_DILATION`` of 2 dilates the first block as well, and so fits other weights.

    Raises:
        UserError: ``MODEL.RESNETS.RES5_DILATION`` is not 2.
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


def make_dc5_stages(*, depth: int, **options) -> list[list[nn.Module]]:
    """Make the stages of :func:`build_resnet_dc5_backbone`, for Python configs.

    Args:
        depth: 50, 101 or 152.
        options: of every block (``norm``, ``stride_in_1x1``).
    """
    *stages, _ = ResNet.make_default_stages(depth, **options)
    res5 = {"in_channels": 1024, "out_channels": 2048, "bottleneck_channels": 512, **options}
    stages.append(
        ResNet.make_stage(BottleneckBlock, 3, stride_per_block=[1, 1, 1], dilation_per_block=[1, 2, 2], **res5)
    )
    return stages


def make_mini_stages(*, in_channels: int, out_channels: int, norm: str) -> list[list[nn.Module]]:
    """Make res2 to res5 of one basic block each; ``out_channels`` are those of res2, doubled by each further stage."""
    stages = []
    for stride in (1, 2, 2, 2):
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        stages.append(ResNet.make_stage(BasicBlock, 1, stride_per_block=[stride], norm=norm, **channels))
        in_channels, out_channels = out_channels, 2 * out_channels
    return stages


@BACKBONE_REGISTRY.register()
def build_mini_resnet_backbone(cfg, input_shape: ShapeSpec) -> ResNet:
    """Build a ResNet with one basic block per stage, small enough to train from scratch on a CPU.

    It reads ``MODEL.RESNETS.STEM_OUT_CHANNELS``, ``RES2_OUT_CHANNELS`` (doubled by each further stage), ``NORM`` and
    ``OUT_FEATURES``, and ``MODEL.BACKBONE.FREEZE_AT``.
    """
    node = cfg.MODEL.RESNETS
    stem = BasicStem(in_channels=input_shape.channels, out_channels=node.STEM_OUT_CHANNELS, norm=node.NORM)
    stages = make_mini_stages(in_channels=node.STEM_OUT_CHANNELS, out_channels=node.RES2_OUT_CHANNELS, norm=node.NORM)
    return ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_mini_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build :func:`build_mini_resnet_backbone` with an FPN and no further level, for detectron2's detectors."""
    return FPN(
        bottom_up=build_mini_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
    )
