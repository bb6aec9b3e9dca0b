"""The decoder: self-attention, Semantics Aligner, cross-attention and box refinement (paper sections 3.2 to 3.4).

Layers go from the coarsest level to the finest. Every layer predicts classes and a box; the box is the next layer's
reference box, unless refinement is switched off.

Shapes: B images, Q queries, C model width, M heads, K classes, L decoder layers.
"""

import torch
from detectron2.config import configurable
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.runtime import autocast_dtype, run_layer
from .boxes import offsets_in_boxes
from .cross_attention import build_cross_attention
from .layers import MLP, FeedForward, start_heads_, xavier_uniform_matrices_
from .position_encoding import sine_embedding
from .semantics_aligner import build_semantics_aligner
from .structures import FeatureLevel, Predictions, QueryBatch

__all__ = ["Decoder", "DecoderLayer", "level_of_layer"]


def level_of_layer(num_layers: int, num_levels: int) -> list[int]:
    """Return the level that each decoder layer attends to: spread evenly, the coarsest (last) level first.

    >>> level_of_layer(6, 3)
    [2, 2, 1, 1, 0, 0]
    """
    return [num_levels - 1 - layer * num_levels // num_layers for layer in range(num_layers)]


class QuerySelfAttention(nn.Module):
    """Multi-head attention among the queries, with separate projections of content and position."""

    def __init__(self, *, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_content = nn.Linear(dim, dim)
        self.query_position = nn.Linear(dim, dim)
        self.key_content = nn.Linear(dim, dim)
        self.key_position = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        xavier_uniform_matrices_(self)
        nn.init.zeros_(self.output.bias)

    def forward(self, content: Tensor, position: Tensor, attention_bias: Tensor | None) -> Tensor:
        """Map contents and positions, both (B, Q, C), to (B, Q, C); see :meth:`QueryBatch.attention_bias`."""
        q = self.query_content(content) + self.query_position(position)
        k = self.key_content(content) + self.key_position(position)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, self.value(content)))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)
        return self.output(attended.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    """One layer of the decoder, without its prediction heads."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        temperature: float,
        aligner: nn.Module,
        cross_attention: nn.Module,
    ):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M, dividing C.
            feedforward_dim: hidden width of the feed-forward network.
            temperature: of the sine embedding of the reference boxes' centres.
            aligner: see :data:`samdetr.modeling.semantics_aligner.SEMANTICS_ALIGNER_REGISTRY`.
            cross_attention: see :data:`samdetr.modeling.cross_attention.CROSS_ATTENTION_REGISTRY`.
        """
        super().__init__()
        self.dim = dim
        self.temperature = temperature
        self.self_attention = QuerySelfAttention(dim=dim, num_heads=num_heads)
        self.self_attention_norm = nn.LayerNorm(dim)
        self.aligner = aligner
        self.cross_attention = cross_attention
        self.cross_attention_norm = nn.LayerNorm(dim)
        self.feedforward = FeedForward(dim, feedforward_dim)

    def forward(
        self,
        content: Tensor,
        reference_boxes: Tensor,
        levels: list[FeatureLevel],
        index: int,
        attention_bias: Tensor | None,
    ) -> Tensor:
        """Update the query contents.

        Args:
            content: (B, Q, C).
            reference_boxes: (B, Q, 4), normalised (cx, cy, w, h).
            levels: the encoded image, from the finest to the coarsest level.
            index: which of the levels this layer looks at.
            attention_bias: see :meth:`QueryBatch.attention_bias`.

        Returns:
            (B, Q, C).
        """
        position = sine_embedding(reference_boxes[..., :2].detach(), self.dim, self.temperature).to(content.dtype)
        content = self.self_attention_norm(content + self.self_attention(content, position, attention_bias))
        aligned = self.aligner(content, reference_boxes, levels[index])
        attended = self.cross_attention(aligned, levels, index)
        if aligned.residual is not None:
            attended = attended + aligned.residual
        content = self.cross_attention_norm(content + attended)
        return self.feedforward(content)


class Decoder(nn.Module):
    """The decoder's layers, which refine the boxes from coarse to fine levels, and every layer's prediction heads."""

    @configurable
    def __init__(
        self,
        *,
        layers: list[nn.Module],
        dim: int,
        num_classes: int,
        prior_prob: float,
        refine_boxes: bool = True,
        look_forward_twice: bool = False,
        relative_offsets: bool = False,
        recompute: bool = False,
    ):
        """
        Args:
            layers: the L decoder layers, each called like :class:`DecoderLayer`.
            dim: model width C.
            num_classes: number of classes K.
            prior_prob: the score that every class starts with.
            refine_boxes: whether each layer's box is the next one's reference box; otherwise all layers start from the
                queries' own reference boxes.
            look_forward_twice: whether a layer learns from the next one's box as well (DINO,
                https://arxiv.org/abs/2203.03605); otherwise each layer learns from its own loss only, as published.
            relative_offsets: whether the unit of the offsets of boxes' centres is the size of the reference box, see
                :func:`samdetr.modeling.boxes.offsets_in_boxes`; otherwise they are offsets of logits, as published.
            recompute: whether to recompute each layer's activations in the backward pass instead of keeping them.
        """
        super().__init__()
        self.refine_boxes = refine_boxes
        self.look_forward_twice = look_forward_twice
        self.relative_offsets = relative_offsets
        self.recompute = recompute
        self.layers = nn.ModuleList(layers)
        self.class_heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in layers)
        self.box_heads = nn.ModuleList(MLP([dim, dim, dim, 4]) for _ in layers)
        for class_head, box_head in zip(self.class_heads, self.box_heads):
            start_heads_(class_head, box_head, prior_prob)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        layers = []
        for _ in range(node.DECODER.NUM_LAYERS):
            cross_attention = build_cross_attention(cfg)
            predict_scales = getattr(cross_attention, "needs_scales", False)
            layers.append(
                DecoderLayer(
                    dim=node.HIDDEN_DIM,
                    num_heads=node.NUM_HEADS,
                    feedforward_dim=node.DECODER.FEEDFORWARD_DIM,
                    temperature=node.POSITION_TEMPERATURE,
                    aligner=build_semantics_aligner(cfg, predict_scales=predict_scales),
                    cross_attention=cross_attention,
                )
            )
        return {
            "layers": layers,
            "dim": node.HIDDEN_DIM,
            "num_classes": node.NUM_CLASSES,
            "prior_prob": node.PRIOR_PROB,
            "refine_boxes": node.DECODER.BOX_REFINEMENT,
            "look_forward_twice": node.DECODER.LOOK_FORWARD_TWICE,
            "relative_offsets": node.RELATIVE_OFFSETS,
            "recompute": node.ACTIVATION_CHECKPOINTING,
        }

    def forward(self, queries: QueryBatch, levels: list[FeatureLevel]) -> Predictions:
        """Decode.

        Args:
            queries: the queries of a batch.
            levels: the encoded image, from the finest to the coarsest level.

        Returns:
            The predictions of all layers.
        """
        content, reference_logits = queries.content, queries.reference_logits.float()
        reference_boxes, bias = reference_logits.sigmoid(), queries.attention_bias(autocast_dtype(content))
        start = reference_logits  # of the same value, and with the gradient that the layer's box passes on
        all_logits, all_boxes = [], []
        for i, level in enumerate(level_of_layer(len(self.layers), len(levels))):
            content = run_layer(
                *(self.layers[i], content, reference_boxes, levels, level, bias),
                recompute=self.recompute,
            )
            all_logits.append(self.class_heads[i](content).float())
            delta = self.box_heads[i](content).float()
            if self.relative_offsets:
                delta = offsets_in_boxes(delta, reference_boxes)
            box_logits = start + delta
            all_boxes.append(box_logits.sigmoid())
            if self.refine_boxes:
                reference_boxes = all_boxes[-1].detach()
                start = reference_logits + delta if self.look_forward_twice else box_logits.detach()
                reference_logits = box_logits.detach()
        return Predictions(torch.stack(all_logits), torch.stack(all_boxes))
