"""The Semantics Aligner: queries resampled from the encoded image (paper sections 3.2 and 3.3).

For each query, RoIAlign pools the features inside its reference box. From these, a small network finds one representative
keypoint per attention head. The features at the keypoint become that head's content query, and the keypoint's place becomes
its position query. Queries and keys then live in the same space.

Shapes: B images, Q queries, C model width, M heads, S bins along each side of a pooled box, H x W the feature map.
"""

from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.roi_align import linear_interpolation_weights, roi_align, roi_align_weights, sample_separably
from ..ops.runtime import exact_products, run_layer, to_autocast_dtype
from .layers import MLP, xavier_uniform_matrices_
from .position_encoding import sine_embedding
from .structures import AlignedQuery, FeatureLevel

__all__ = ["SEMANTICS_ALIGNER_REGISTRY", "IdentityAligner", "SemanticsAligner", "build_semantics_aligner"]

SEMANTICS_ALIGNER_REGISTRY = Registry("SEMANTICS_ALIGNER")
SEMANTICS_ALIGNER_REGISTRY.__doc__ = """
Registry of the parts that prepare a decoder layer's queries for its cross-attention, chosen by
``cfg.MODEL.SAMDETR.ALIGNER.NAME``.

A registered class is called as ``Aligner(cfg, predict_scales=bool)``, once for each decoder layer, where
``predict_scales`` tells whether the cross-attention needs Gaussian scales. The resulting module is called with

* ``content`` (B, Q, C), the query contents after self-attention,
* ``reference_boxes`` (B, Q, 4), normalised (cx, cy, w, h), which carry a gradient where they are learned,
* ``level``, the :class:`FeatureLevel` that this layer attends to,

and returns an :class:`AlignedQuery`: ``content`` and ``position`` (B, Q, M, C), ``keypoints`` (B, Q, M, 2), if
``predict_scales``, ``gaussian_scales`` (B, Q, M, 2) and, if it has something to add to the query contents, ``residual``
(B, Q, C).
"""


def build_semantics_aligner(cfg, *, predict_scales: bool) -> nn.Module:
    """Build the aligner of one decoder layer that ``cfg.MODEL.SAMDETR.ALIGNER.NAME`` names."""
    return SEMANTICS_ALIGNER_REGISTRY.get(cfg.MODEL.SAMDETR.ALIGNER.NAME)(cfg, predict_scales=predict_scales)


def _common_arguments(cfg, predict_scales: bool) -> dict:
    """Return what every aligner here takes from the config."""
    node = cfg.MODEL.SAMDETR
    return {
        "dim": node.HIDDEN_DIM,
        "num_heads": node.NUM_HEADS,
        "temperature": node.POSITION_TEMPERATURE,
        "predict_scales": predict_scales,
    }


@SEMANTICS_ALIGNER_REGISTRY.register()
class SemanticsAligner(nn.Module):
    """Semantic-aligned matching, as published."""

    @configurable
    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        pooled_size: int,
        reduction: int,
        hidden_dims: list[int],
        temperature: float,
        num_keypoints: int = 0,
        predict_scales: bool = False,
        pooled_content: bool = False,
    ):
        """
        Args:
            dim: model width C.
            num_heads: attention heads M.
            pooled_size: RoIAlign's bins S along each side of a box.
            reduction: the pooled features are reduced to C / reduction channels before the keypoint search; divides C.
            hidden_dims: widths of the hidden layers of the keypoint search.
            temperature: of the keypoints' sine embedding.
            num_keypoints: keypoints per query; must divide ``num_heads``. 0 means one per head.
            predict_scales: whether to predict the scales (sx, sy) of a Gaussian at each keypoint as well.
            pooled_content: whether the query contents get a linear map of the keypoint search's last hidden layer, which has
                seen all pooled features and where they are, as the box head of an R-CNN does. Otherwise they get what the
                cross-attention returns only, as published.
        """
        super().__init__()
        if dim % reduction:
            raise ValueError(f"reduction ({reduction}) does not divide dim ({dim}).")
        if num_keypoints and num_heads % num_keypoints:
            raise ValueError(f"num_keypoints ({num_keypoints}) does not divide num_heads ({num_heads}).")
        self.dim = dim
        self.num_heads = num_heads
        self.num_keypoints = num_keypoints or num_heads
        self.pooled_size = pooled_size
        self.temperature = temperature
        self.predict_scales = predict_scales
        self.reduction = nn.Linear(dim, dim // reduction)
        num_values = (4 if predict_scales else 2) * self.num_keypoints
        self.keypoint_head = MLP([dim // reduction * pooled_size**2, *hidden_dims, num_values])
        self.content_gate = nn.Linear(dim, num_heads * dim)
        self.position_gate = nn.Linear(dim, num_heads * dim)
        xavier_uniform_matrices_(self)
        last_layer = self.keypoint_head.layers[-1]
        nn.init.zeros_(last_layer.bias)
        self.pooled_content = nn.Linear(last_layer.in_features, dim) if pooled_content else None
        if self.pooled_content is not None:  # it starts as the published aligner
            nn.init.zeros_(self.pooled_content.weight)
            nn.init.zeros_(self.pooled_content.bias)

    @classmethod
    def from_config(cls, cfg, *, predict_scales):
        node = cfg.MODEL.SAMDETR
        return {
            **_common_arguments(cfg, predict_scales),
            "pooled_size": node.ALIGNER.POOLED_SIZE,
            "reduction": node.ALIGNER.REDUCTION,
            "hidden_dims": list(node.ALIGNER.KEYPOINT_HIDDEN_DIMS),
            "num_keypoints": node.ALIGNER.NUM_KEYPOINTS,
            "pooled_content": node.ALIGNER.POOLED_CONTENT,
        }

    def forward(self, content: Tensor, reference_boxes: Tensor, level: FeatureLevel) -> AlignedQuery:
        """Align the queries; see :data:`SEMANTICS_ALIGNER_REGISTRY`."""
        features = to_autocast_dtype(level.features)
        rows, columns = roi_align_weights(reference_boxes, level.valid_size, level.size, self.pooled_size)
        local_keypoints, gaussian_scales, residual = self.search_keypoints(features, rows, columns)
        keypoints = reference_boxes[..., None, :2] + reference_boxes[..., None, 2:] / 2 * local_keypoints
        sampled = self.resample(features, rows, columns, local_keypoints)
        return AlignedQuery(
            # Gates and sine embeddings are cheap to recompute and large to keep.
            content=run_layer(self.gated_content, sampled, content, recompute=True, random=False),
            position=run_layer(self.gated_position, keypoints.detach(), content, recompute=True, random=False),
            keypoints=keypoints,
            gaussian_scales=gaussian_scales,
            residual=residual,
        )

    def gated_content(self, sampled: Tensor, content: Tensor) -> Tensor:
        """Weight sampled features (B, Q, M, C) by gates that the query contents (B, Q, C) determine."""
        return sampled * self.content_gate(content).unflatten(-1, (self.num_heads, self.dim)).sigmoid()

    def gated_position(self, keypoints: Tensor, content: Tensor) -> Tensor:
        """Weight the sine embedding of keypoints (B, Q, M, 2) by gates that the query contents (B, Q, C) determine."""
        gate = self.position_gate(content).unflatten(-1, (self.num_heads, self.dim))
        return sine_embedding(keypoints, self.dim, self.temperature).to(gate.dtype) * gate.sigmoid()

    def search_keypoints(
        self, features: Tensor, rows: Tensor, columns: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Find the representative keypoints.

        Args:
            features: (B, H, W, C).
            rows, columns: from :func:`roi_align_weights`.

        Returns:
            Keypoints (B, Q, M, 2) relative to the box, (x, y) in (-1, 1); raw Gaussian scales (B, Q, M, 2) or None; and what
            the pooled features add to the query contents, (B, Q, C), or None.
        """
        # Reducing the channels and pooling are both linear. Reducing first leaves fewer channels to pool.
        reduced = roi_align(F.linear(features, self.reduction.weight), rows, columns)
        reduced = reduced + self.reduction.bias.to(reduced.dtype)
        hidden = self.keypoint_head.hidden(reduced.relu_().flatten(2))
        values = self.keypoint_head.layers[-1](hidden).float()
        values = values.unflatten(-1, (-1, self.num_keypoints, 2))  # all keypoints, then all their scales
        if self.num_keypoints < self.num_heads:
            values = values.repeat_interleave(self.num_heads // self.num_keypoints, dim=-2)
        keypoints, *scales = values.unbind(-3)
        residual = None if self.pooled_content is None else self.pooled_content(hidden)
        return keypoints.tanh(), scales[0] if scales else None, residual

    def resample(self, features: Tensor, rows: Tensor, columns: Tensor, keypoints: Tensor) -> Tensor:
        """Sample the pooled features bilinearly, with zeros outside (``grid_sample``, corners not aligned).

        Args:
            features: (B, H, W, C).
            rows, columns: from :func:`roi_align_weights`.
            keypoints: (B, Q, M, 2), see :meth:`search_keypoints`.

        Returns:
            (B, Q, M, C).
        """
        bins = ((keypoints + 1) * self.pooled_size - 1) / 2
        in_columns, in_rows = linear_interpolation_weights(bins, self.pooled_size).unbind(-2)  # (B, Q, M, S) each
        # Pooling and sampling are both separable and linear, so the pooled features of full width need not exist.
        with exact_products(features.device):
            rows, columns = in_rows @ rows, in_columns @ columns  # (B, Q, M, H or W)
        sampled = sample_separably(features, rows.flatten(1, 2), columns.flatten(1, 2))
        return sampled.unflatten(1, keypoints.shape[1:3])


@SEMANTICS_ALIGNER_REGISTRY.register()
class IdentityAligner(nn.Module):
    """No alignment: every head gets the query as it is, at the centre of its box. A baseline.

    Gaussian scales, if they are needed, come from a linear map of the content.
    """

    @configurable
    def __init__(self, *, dim: int, num_heads: int, temperature: float, predict_scales: bool = False):
        """See :class:`SemanticsAligner`."""
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.temperature = temperature
        self.scales = nn.Linear(dim, 2 * num_heads) if predict_scales else None
        xavier_uniform_matrices_(self)

    @classmethod
    def from_config(cls, cfg, *, predict_scales):
        return _common_arguments(cfg, predict_scales)

    def forward(self, content: Tensor, reference_boxes: Tensor, level: FeatureLevel) -> AlignedQuery:
        """Return the queries unchanged; see :data:`SEMANTICS_ALIGNER_REGISTRY`."""
        centres = reference_boxes[..., :2]
        position = sine_embedding(centres.detach(), self.dim, self.temperature).to(content.dtype)
        scales = None
        if self.scales is not None:
            scales = self.scales(content).float().unflatten(-1, (self.num_heads, 2))

        def for_each_head(x: Tensor) -> Tensor:
            return x[:, :, None].expand(-1, -1, self.num_heads, -1)

        return AlignedQuery(for_each_head(content), for_each_head(position), for_each_head(centres), scales)
