"""Draw what each decoder layer looks at: reference box, keypoints, Gaussians and attention (paper, Figure 5).

Hooks record it while the model runs; the model's own functions compute it.

Shapes: B images, Q queries, n chosen queries, M heads, H x W a layer's feature map.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..errors import UserError
from ..modeling import SAMDETR
from ..modeling.cross_attention import DotProductAttention
from ..modeling.structures import AlignedQuery, FeatureLevel
from .text import as_drawn

__all__ = ["RecordedLayer", "draw_attention", "draw_head", "record_attention"]


@dataclass
class RecordedLayer:
    """One decoder layer's cross-attention in one forward pass.

    Attributes:
        level_index: which of the model's levels it attends to, 0 being the finest.
        reference_boxes: (B, Q, 4), normalised (cx, cy, w, h), the boxes that the layer started from.
        query: what the aligner handed to the cross-attention.
        level: the feature level that it attends to.
        cross_attention: the layer's module.
        output: (B, Q, C), what the module returned.
        precision: of mixed precision, if the model ran in it.
    """

    level_index: int
    reference_boxes: Tensor
    query: AlignedQuery
    level: FeatureLevel
    cross_attention: DotProductAttention
    output: Tensor
    precision: torch.dtype | None

    def chosen(self, queries: Sequence[int]) -> AlignedQuery:
        """Return the aligned query of some queries only."""
        fields = (self.query.content, self.query.position, self.query.keypoints, self.query.gaussian_scales)
        return AlignedQuery(*(None if field is None else field[:, list(queries)] for field in fields))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.output.device.type, dtype=self.precision, enabled=self.precision is not None)

    @torch.no_grad()
    def attention_weights(self, queries: Sequence[int]) -> Tensor:
        """Return the weights that the model used, (B, n, M, H, W) float32; they sum to one over the unpadded pixels."""
        with self._autocast():
            weights = self.cross_attention.attention_weights(self.chosen(queries), self.level)
        return weights.float().transpose(1, 2).unflatten(-1, self.level.size)

    @torch.no_grad()
    def gaussians(self, queries: Sequence[int]) -> Tensor | None:
        """Return each head's Gaussian, (B, n, M, H, W) in (0, 1], which multiplies its weights; None without SMCA."""
        with self._autocast():
            x, y = self.cross_attention.log_gaussian(self.chosen(queries), self.level)
        return None if x is None else (x.float()[..., None, :] + y.float()[..., :, None]).exp().transpose(1, 2)


@contextlib.contextmanager
def record_attention(model: nn.Module) -> Iterator[list[RecordedLayer]]:
    """Record every decoder layer while a SAMDETR runs inside this context.

    Yields:
        A list with one :class:`RecordedLayer` for each layer of the latest forward pass, filled when the model has run.

    Raises:
        UserError: the model is no SAMDETR, or its cross-attention does not attend to every pixel or is not one of this
            project's.
    """
    if not isinstance(model, SAMDETR):
        raise UserError(f"The attention of a {type(model).__name__} is not shown here: only that of a SAMDETR is.")
    layers = model.decoder.layers
    attentions = [getattr(layer, "cross_attention", layer) for layer in layers]
    if not all(isinstance(attention, DotProductAttention) for attention in attentions):
        raise UserError(
            f"{type(attentions[0]).__name__} does not expose its attention weights: only classes derived "
            "from DotProductAttention do."
        )
    recorded: list[RecordedLayer] = []
    boxes: list[Tensor] = []

    def after_aligner(module, arguments, output):
        if len(boxes) == len(layers):  # another forward pass
            boxes.clear()
            recorded.clear()
        boxes.append(arguments[1].detach())

    def after_attention(module, arguments, output):
        query, levels, index = arguments
        device = output.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        recorded.append(RecordedLayer(index, boxes[-1], query, levels[index], module, output.detach(), precision))

    handles = [layer.aligner.register_forward_hook(after_aligner) for layer in layers]
    handles += [layer.cross_attention.register_forward_hook(after_attention) for layer in layers]
    try:
        with torch.no_grad():
            yield recorded
    finally:
        for handle in handles:
            handle.remove()


def head_colors(number: int) -> np.ndarray:
    """Return (number, 3) colours in [0, 1] that distinguish the heads."""
    return matplotlib.colormaps["hsv"](np.linspace(0, 1, number, endpoint=False))[:, :3]


class QueryView:
    """One query of one image in one layer, as numpy arrays in the image's pixels."""

    def __init__(self, image: np.ndarray, layer: RecordedLayer, query: int):
        self.image = image
        height, width = image.shape[:2]
        self.extent = (0, width, height, 0)
        cx, cy, w, h = layer.reference_boxes[0, query].tolist()
        self.corner, self.box_size = ((cx - w / 2) * width, (cy - h / 2) * height), (w * width, h * height)
        self.keypoints = layer.query.keypoints[0, query].detach().cpu().numpy() * (width, height)
        valid_height, valid_width = (round(x) for x in layer.level.valid_size[0].tolist())
        valid = (slice(None), slice(valid_height), slice(valid_width))
        self.weights = layer.attention_weights([query])[0, 0][valid].cpu().numpy()
        gaussians = layer.gaussians([query])
        self.gaussians = None if gaussians is None else gaussians[0, 0][valid].cpu().numpy()
        self.pixel_centres = (
            (np.arange(valid_width) + 0.5) * width / valid_width,
            (np.arange(valid_height) + 0.5) * height / valid_height,
        )

    def draw_image(self, axis, alpha: float = 1.0) -> None:
        axis.imshow(self.image, extent=self.extent, alpha=alpha)
        axis.add_patch(Rectangle(self.corner, *self.box_size, fill=False, color="white", linewidth=2.5))
        axis.add_patch(Rectangle(self.corner, *self.box_size, fill=False, color="tab:red", linewidth=1.2))
        axis.set(xlim=self.extent[:2], ylim=self.extent[2:], xticks=[], yticks=[])

    def draw_head(self, axis, head: int, color) -> None:
        """Draw attention over the darkened image, the head's keypoint, and the line where its Gaussian is half its height."""
        self.draw_image(axis, alpha=0.55)
        axis.set_facecolor("black")
        weights = self.weights[head]
        opaque = 0.9 * np.sqrt(
            weights / max(weights.max(), 1e-12)
        )  # shows weak attention, and leaves the image visible
        axis.imshow(weights, extent=self.extent, cmap="inferno", alpha=opaque, interpolation="bilinear", vmin=0)
        self.draw_gaussian(axis, head, color)
        axis.plot(*self.keypoints[head], "o", color=color, markeredgecolor="white", markersize=6, clip_on=True)

    def draw_gaussian(self, axis, head: int, color) -> None:
        if self.gaussians is not None and min(self.gaussians[head].shape) > 1:
            height = self.gaussians[head].max()
            axis.contour(*self.pixel_centres, self.gaussians[head], levels=[height / 2], colors=[color], linewidths=1.2)

    def draw_summary(self, axis) -> None:
        """Draw the image, the reference box, and all heads' keypoints."""
        self.draw_image(axis)
        for keypoint, color in zip(self.keypoints, head_colors(len(self.keypoints))):
            axis.plot(*keypoint, "o", color=color, markeredgecolor="white", markersize=6)


def draw_attention(image: np.ndarray, layers: Sequence[RecordedLayer], query: int, title: str = "") -> np.ndarray:
    """Draw a sheet for one query: a row for each layer, first the image with box and keypoints, then every head.

    Args:
        image: (H, W, 3) uint8, RGB, the only image of the recorded batch.
        layers: from :func:`record_attention`.
        query: index of the query.
        title: of the sheet.

    Returns:
        (H', W', 3) uint8, RGB.
    """
    heads = layers[0].query.keypoints.shape[2]
    side = 1.9
    ratio = image.shape[0] / image.shape[1]
    figure = Figure(figsize=(side * (heads + 1), side * ratio * len(layers) + 0.7), dpi=80, layout="constrained")
    axes = figure.subplots(len(layers), heads + 1, squeeze=False)
    for row, (layer, of_layer) in enumerate(zip(layers, axes)):
        view = QueryView(image, layer, query)
        view.draw_summary(of_layer[0])
        of_layer[0].set_ylabel(f"layer {row + 1}, level {layer.level_index}", fontsize=9)
        for head, color in enumerate(head_colors(heads)):
            view.draw_head(of_layer[head + 1], head, color)
    axes[0, 0].set_title("box, keypoints", fontsize=9)
    for head in range(heads):
        axes[0, head + 1].set_title(f"head {head + 1}", fontsize=9)
    if title:
        figure.suptitle(as_drawn(title), fontsize=10)
    return _rendered(figure)


def draw_head(image: np.ndarray, layer: RecordedLayer, query: int, head: int) -> np.ndarray:
    """Draw one head of one layer; see :func:`draw_attention`."""
    figure = Figure(figsize=(4, 4 * image.shape[0] / image.shape[1]), dpi=100, layout="constrained")
    view = QueryView(image, layer, query)
    view.draw_head(figure.subplots(), head, head_colors(layer.query.keypoints.shape[2])[head])
    return _rendered(figure)


def _rendered(figure: Figure) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
