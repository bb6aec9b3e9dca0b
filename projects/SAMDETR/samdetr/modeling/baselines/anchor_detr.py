"""Anchor DETR: anchor points as queries, and row-column decoupled attention (Wang et al. 2022, https://arxiv.org/abs/2109.07107).

A query is a learned pattern at a learned anchor point; each pattern is at every point. Positions of queries and of pixels
go through the same small networks. Attention to a map averages over the columns of each row, then over the rows, so that no
weight of every pixel exists.

Shapes: B images, Q queries (P patterns at each of A anchor points), C model width, M heads, H x W the feature map,
L decoder layers.
"""

import math

import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import UserError
from ...ops.runtime import run_layer
from ..layers import MLP, FeedForward, start_heads_, start_projections_, xavier_uniform_matrices_
from ..levels import replace_features
from ..meta_arch import SAMDETR
from ..position_encoding import coordinate_embedding, sine_embedding
from ..structures import FeatureLevel, ImageTarget, Predictions, QueryBatch

__all__ = ["AnchorDETR", "AnchorDecoder", "AnchorEncoder", "AnchorQueries", "PositionEncoder", "RowColumnAttention"]

_MARGIN = 1e-5  # distance of an anchor point's coordinate from 0 and 1, so that its logit is finite
_START_OF_SIZE = -2.0  # logit of the width and height that every box starts with, as published: 0.12


@META_ARCH_REGISTRY.register()
class AnchorDETR(SAMDETR):
    """Anchor DETR, on one feature map."""

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        num_patterns = node.QUERY_GENERATOR.NUM_PATTERNS
        if len(node.IN_FEATURES) != 1:
            raise UserError(f"MODEL.SAMDETR.IN_FEATURES is {list(node.IN_FEATURES)}: name one feature for AnchorDETR.")
        if node.NUM_QUERIES % num_patterns:
            raise UserError(
                f"MODEL.SAMDETR.NUM_QUERIES ({node.NUM_QUERIES}) is not divisible by "
                f"MODEL.SAMDETR.QUERY_GENERATOR.NUM_PATTERNS ({num_patterns}): change one of them."
            )
        widths = {"dim": node.HIDDEN_DIM, "num_heads": node.NUM_HEADS}
        positions = PositionEncoder(dim=node.HIDDEN_DIM, temperature=node.POSITION_TEMPERATURE)
        recompute = node.ACTIVATION_CHECKPOINTING
        return {
            **cls.shared_parts(cfg),
            "encoder": AnchorEncoder(
                layers=[
                    AnchorEncoderLayer(**widths, feedforward_dim=node.ENCODER.FEEDFORWARD_DIM)
                    for _ in range(node.ENCODER.NUM_LAYERS)
                ],
                positions=positions,
                recompute=recompute,
            ),
            "query_generator": AnchorQueries(
                num_points=node.NUM_QUERIES // num_patterns, num_patterns=num_patterns, dim=node.HIDDEN_DIM
            ),
            "decoder": AnchorDecoder(
                layers=[
                    AnchorDecoderLayer(**widths, feedforward_dim=node.DECODER.FEEDFORWARD_DIM)
                    for _ in range(node.DECODER.NUM_LAYERS)
                ],
                positions=positions,
                dim=node.HIDDEN_DIM,
                num_classes=node.NUM_CLASSES,
                prior_prob=node.PRIOR_PROB,
                recompute=recompute,
            ),
        }


class PositionEncoder(nn.Module):
    """Encode points, or single coordinates, in the same way for queries and keys: g(sine(position))."""

    def __init__(self, *, dim: int, temperature: float):
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.of_point = MLP([dim, dim, dim])
        self.of_coordinate = MLP([dim, dim, dim])
        xavier_uniform_matrices_(self)

    def encode_points(self, points: Tensor) -> Tensor:
        """Encode points (..., 2) in [0, 1] as (..., C)."""
        return self.of_point(sine_embedding(points, self.dim, self.temperature))

    def encode_coordinates(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Encode x and y of points (..., 2) in [0, 1] by themselves, as (..., C) each."""
        x, y = self.of_coordinate(coordinate_embedding(points, self.dim, self.temperature)).unbind(-2)
        return x, y

    def encode_pixels(self, level: FeatureLevel) -> tuple[Tensor, Tensor]:
        """Encode the x of a map's columns, (B, W, C), and the y of its rows, (B, H, C)."""
        centres = [
            (torch.arange(length, device=level.valid_size.device) + 0.5) / level.valid_size[:, axis, None]
            for axis, length in enumerate(level.size)
        ]
        y, x = (self.of_coordinate(coordinate_embedding(c, self.dim, self.temperature)) for c in centres)
        return x, y


class RowColumnAttention(nn.Module):
    """The paper's "Row-Column Decoupled Attention".

    Weights along x are the softmax over the columns' mean features, weights along y over the rows'. The values of each row are
    averaged by the former, then the rows by the latter.
    """

    def __init__(self, *, dim: int, num_heads: int):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
        """
        super().__init__()
        self.num_heads = num_heads
        self.query_x = nn.Linear(dim, dim)
        self.query_y = nn.Linear(dim, dim)
        self.key_x = nn.Linear(dim, dim)
        self.key_y = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        start_projections_(self.query_x, self.query_y, self.key_x, self.key_y, self.value)
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, query_x: Tensor, query_y: Tensor, level: FeatureLevel, x: Tensor, y: Tensor) -> Tensor:
        """Attend.

        Args:
            query_x, query_y: (B, Q, C), contents with the position along x, and along y.
            level: the map.
            x, y: position encodings of its columns, (B, W, C), and of its rows, (B, H, C).

        Returns:
            (B, Q, C).
        """
        features, mask = level.features, level.padding_mask
        value = self.value(features).unflatten(-1, (self.num_heads, -1))
        value = value.permute(0, 3, 2, 1, 4).flatten(3)  # (B, M, W, H * C / M)
        if mask is None:
            columns, rows = features.mean(1), features.mean(2)
            outside_x = outside_y = None
        else:
            height, width = level.valid_size[:, :, None, None].unbind(1)
            features = features.masked_fill(mask[..., None], 0)
            columns, rows = features.sum(1) / height, features.sum(2) / width
            outside_x, outside_y = mask[:, 0], mask[:, :, 0]  # the first row and column are never padding
        weights_x = self.weights(self.query_x(query_x), self.key_x(columns + x), outside_x).to(value.dtype)
        weights_y = self.weights(self.query_y(query_y), self.key_y(rows + y), outside_y).to(value.dtype)
        averaged = (weights_x @ value).unflatten(-1, (level.size[0], -1))  # (B, M, Q, H, C / M)
        averaged = (weights_y[..., None, :] @ averaged)[..., 0, :]
        return self.output(averaged.transpose(1, 2).flatten(2))

    def weights(self, query: Tensor, key: Tensor, outside: Tensor | None) -> Tensor:
        """Return the softmax over n keys: (B, M, Q, n) float32, zero where ``outside``, (B, n), is True."""
        q, k = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key))
        logits = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])
        if outside is not None:
            logits = logits.masked_fill(outside[:, None, None], -math.inf)
        return logits.softmax(-1)


class AnchorEncoderLayer(nn.Module):
    """Row-column decoupled self-attention and feed-forward network, each followed by residual and LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.self_attention = RowColumnAttention(dim=dim, num_heads=num_heads)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)

    def forward(self, level: FeatureLevel, x: Tensor, y: Tensor) -> Tensor:
        """Return the new features (B, H * W, C) of a map; for its position encodings see :class:`RowColumnAttention`."""
        features = level.features
        queries = ((features + x[:, None]).flatten(1, 2), (features + y[:, :, None]).flatten(1, 2))
        attended = self.self_attention(*queries, level, x, y)
        return self.feedforward(self.self_attention_norm(features.flatten(1, 2) + attended))


class AnchorEncoder(nn.Module):
    """Anchor DETR's encoder."""

    def __init__(self, *, layers: list[nn.Module], positions: PositionEncoder, recompute: bool = False):
        """
        Args:
            layers: each called like :class:`AnchorEncoderLayer`.
            positions: encodes the pixels' positions; the decoder has the same.
            recompute: whether to recompute each layer's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.positions = positions
        self.recompute = recompute

    def forward(self, levels: list[FeatureLevel]) -> list[FeatureLevel]:
        """Encode the level; see :data:`samdetr.modeling.encoder.ENCODER_REGISTRY`."""
        x, y = self.positions.encode_pixels(levels[0])
        for layer in self.layers:
            levels = replace_features(levels, run_layer(layer, levels[0], x, y, recompute=self.recompute))
        return levels


class AnchorQueries(nn.Module):
    """Every pattern at every anchor point ("Anchor Points to Object Query"); both are learned."""

    def __init__(self, *, num_points: int, num_patterns: int, dim: int):
        """
        Args:
            num_points: anchor points A.
            num_patterns: patterns P, so that there are P * A queries, ordered by pattern.
            dim: model width C.
        """
        super().__init__()
        self.points = nn.Parameter(torch.rand(num_points, 2))
        self.patterns = nn.Parameter(torch.randn(num_patterns, dim))

    def num_denoising(self, targets: list[ImageTarget]) -> int:
        """Return 0: there are no denoising queries."""
        return 0

    def forward(self, levels: list[FeatureLevel], targets: list[ImageTarget] | None = None) -> QueryBatch:
        """Make the queries: patterns as contents, and reference boxes with the anchor points as centres, logits 0 as sizes."""
        batch = levels[0].features.shape[0]
        logits = F.pad(self.points.logit(_MARGIN), (0, 2)).repeat(len(self.patterns), 1)
        content = self.patterns.repeat_interleave(len(self.points), dim=0)
        return QueryBatch(content.expand(batch, -1, -1), logits.expand(batch, -1, -1))


class AnchorDecoderLayer(nn.Module):
    """Self-attention, row-column decoupled cross-attention and feed-forward network, each with residual and LayerNorm."""

    def __init__(self, *, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        xavier_uniform_matrices_(self)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.cross_attention = RowColumnAttention(dim=dim, num_heads=num_heads)
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)

    def forward(
        self,
        content: Tensor,
        position: Tensor,
        coordinates: tuple[Tensor, Tensor],
        level: FeatureLevel,
        pixels: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Update the contents.

        Args:
            content, position: (B, Q, C).
            coordinates: position encodings of the queries' x and y, (B, Q, C) each.
            level: the encoded map.
            pixels: position encodings of its columns and rows.

        Returns:
            (B, Q, C).
        """
        q = content + position
        attended, _ = self.self_attention(q, q, content, need_weights=False)
        content = self.self_attention_norm(content + attended)
        x, y = coordinates
        content = self.cross_attention_norm(content + self.cross_attention(content + x, content + y, level, *pixels))
        return self.feedforward(content)


class AnchorDecoder(nn.Module):
    """Anchor DETR's decoder, whose layers share their prediction heads; boxes are relative to the anchor points."""

    def __init__(
        self,
        *,
        layers: list[nn.Module],
        positions: PositionEncoder,
        dim: int,
        num_classes: int,
        prior_prob: float,
        recompute: bool = False,
    ):
        """
        Args:
            layers: the L decoder layers, each called like :class:`AnchorDecoderLayer`.
            positions: encodes the anchor points; the encoder has the same.
            dim, num_classes, prior_prob, recompute: see :class:`samdetr.modeling.decoder.Decoder`.
        """
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList(layers)
        self.positions = positions
        self.class_head = nn.Linear(dim, num_classes)
        self.box_head = MLP([dim, dim, dim, 4])
        start_heads_(self.class_head, self.box_head, prior_prob)
        nn.init.constant_(self.box_head.layers[-1].bias[2:], _START_OF_SIZE)

    def forward(self, queries: QueryBatch, levels: list[FeatureLevel]) -> Predictions:
        """Decode; see :meth:`samdetr.modeling.decoder.Decoder.forward`."""
        content, reference_logits, level = queries.content, queries.reference_logits.float(), levels[0]
        points = reference_logits[..., :2].sigmoid()
        position, coordinates = self.positions.encode_points(points), self.positions.encode_coordinates(points)
        pixels = self.positions.encode_pixels(level)
        contents = []
        for layer in self.layers:
            content = run_layer(layer, content, position, coordinates, level, pixels, recompute=self.recompute)
            contents.append(content)
        output = torch.stack(contents)
        boxes = (reference_logits + self.box_head(output).float()).sigmoid()
        return Predictions(self.class_head(output).float(), boxes)
