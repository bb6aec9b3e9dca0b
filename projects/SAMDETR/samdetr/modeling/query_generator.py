"""Make the decoder's queries: learned or selected reference boxes and, for DN in training, denoising queries.

Shapes: B images, Q matching queries, C model width, K classes; G groups of n slots (and n negatives, if there are any) make the
Q_dn denoising queries.
"""

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ..ops.runtime import upload
from .pixel_head import EncoderSelection
from .structures import DenoisingTargets, FeatureLevel, ImageTarget, QueryBatch

__all__ = [
    "QUERY_GENERATOR_REGISTRY",
    "DenoisingQueryGenerator",
    "LearnedQueryGenerator",
    "build_query_generator",
    "denoising_attention_mask",
]

QUERY_GENERATOR_REGISTRY = Registry("QUERY_GENERATOR")
QUERY_GENERATOR_REGISTRY.__doc__ = """
Registry of query generators, chosen by ``cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME``.

A registered class is called as ``Generator(cfg)``. The resulting module is called with the encoded image, a list of
:class:`FeatureLevel` from the finest to the coarsest level, and, in training, a list of B :class:`ImageTarget` (else None).
It returns a :class:`QueryBatch`, whose matching queries must not depend on padded pixels. Its method
``num_denoising(targets)`` returns how many denoising queries it makes for such a list, without padding and negatives (0 if it
makes none): what their losses are divided by.
"""


def build_query_generator(cfg) -> nn.Module:
    """Build the query generator that ``cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME`` names."""
    return QUERY_GENERATOR_REGISTRY.get(cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME)(cfg)


@QUERY_GENERATOR_REGISTRY.register()
class LearnedQueryGenerator(nn.Module):
    """A fixed number of queries, with contents that start at zero and reference boxes that are learned or selected."""

    @configurable
    def __init__(self, *, num_queries: int, dim: int, selection: EncoderSelection | None = None):
        """
        Args:
            num_queries: number of queries Q.
            dim: model width C.
            selection: selects the reference boxes in each image, and may add to the contents; without it they are learned, the
                same for all images.
        """
        super().__init__()
        self.num_queries = num_queries
        self.dim = dim
        self.selection = selection
        if selection is None:
            self.reference_logits = nn.Parameter(torch.randn(num_queries, 4))

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            "num_queries": node.NUM_QUERIES,
            "dim": node.HIDDEN_DIM,
            "selection": EncoderSelection(cfg) if node.QUERY_GENERATOR.SELECT_FROM_ENCODER else None,
        }

    def num_denoising(self, targets: list[ImageTarget]) -> int:
        """Return 0: there are no denoising queries."""
        return 0

    def forward(self, levels: list[FeatureLevel], targets: list[ImageTarget] | None = None) -> QueryBatch:
        """Make the queries; see :data:`QUERY_GENERATOR_REGISTRY`."""
        batch_size = levels[0].features.shape[0]
        content = self.content.expand(batch_size, -1, -1)
        if self.selection is None:
            return QueryBatch(content, self.reference_logits.expand(batch_size, -1, -1))
        reference_logits, selected_content, predictions = self.selection.select(levels, self.num_queries)
        if selected_content is not None:
            content = content + selected_content
        return QueryBatch(content, reference_logits, proposals=predictions)

    @property
    def content(self) -> Tensor:
        """The contents of the matching queries, (Q, C)."""
        return next(self.parameters()).new_zeros(self.num_queries, self.dim)


def denoising_attention_mask(num_matching: int, num_groups: int, valid: Tensor) -> Tensor:
    """Return the self-attention mask for matching queries followed by denoising queries.

    Matching queries attend to each other only. A denoising query attends to the matching queries and to its own group.
    No query attends to padding slots.

    Args:
        num_matching: number of matching queries Q.
        num_groups: number of groups G.
        valid: (B, Q_dn) bool, False at padding slots; the slots are ordered by group.

    Returns:
        (B, 1, Q + Q_dn, Q + Q_dn) bool, True where query i (third dimension) may attend to query j (fourth dimension).
    """
    batch, num_denoising = valid.shape
    group = torch.full((num_matching + num_denoising,), -1, device=valid.device)  # -1: the matching queries
    if num_denoising:
        group[num_matching:] = torch.arange(num_denoising, device=valid.device) // (num_denoising // num_groups)
    allowed = (group[None, :] == -1) | (group[:, None] == group[None, :])
    visible = torch.cat([valid.new_ones(batch, num_matching), valid], dim=1)
    return (allowed[None] & visible[:, None])[:, None]


@QUERY_GENERATOR_REGISTRY.register()
class DenoisingQueryGenerator(LearnedQueryGenerator):
    """Learned queries and, in training, queries made from noisy ground truth (DN-DETR, https://arxiv.org/abs/2203.01305).

    Contents are label embeddings with an indicator in the last channel: 1 for denoising queries, and 0 for matching queries,
    which carry the embedding of an unknown label, in evaluation as well.
    """

    @configurable
    def __init__(
        self,
        *,
        num_queries: int,
        dim: int,
        num_classes: int,
        num_groups: int,
        max_denoising_queries: int,
        box_noise: float,
        label_noise: float,
        with_negatives: bool = False,
        selection: EncoderSelection | None = None,
    ):
        """
        Args:
            num_queries, dim, selection: see :class:`LearnedQueryGenerator`.
            num_classes: number of classes K.
            num_groups: maximum number of groups; there are fewer if an image has many boxes.
            max_denoising_queries: maximum number of denoising queries per image.
            box_noise: centres move by up to this share of half the size, and sizes change by up to this share.
            label_noise: probability that a label is replaced by one drawn uniformly.
            with_negatives: whether each group has a second query of every box, with one to two times the noise of boxes, that
                is background (contrastive DN, DINO, https://arxiv.org/abs/2203.03605).
        """
        super().__init__(num_queries=num_queries, dim=dim, selection=selection)
        self.num_classes = num_classes
        self.num_groups = num_groups
        self.max_denoising_queries = max_denoising_queries
        self.box_noise = box_noise
        self.label_noise = label_noise
        self.with_negatives = with_negatives
        self.label_embedding = nn.Embedding(num_classes + 1, dim - 1)  # the last row: unknown

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SAMDETR
        return {
            **super().from_config(cfg),
            "num_classes": node.NUM_CLASSES,
            "num_groups": node.QUERY_GENERATOR.DN_GROUPS,
            "max_denoising_queries": node.QUERY_GENERATOR.DN_MAX_QUERIES,
            "box_noise": node.QUERY_GENERATOR.DN_BOX_NOISE,
            "label_noise": node.QUERY_GENERATOR.DN_LABEL_NOISE,
            "with_negatives": node.QUERY_GENERATOR.DN_NEGATIVES,
        }

    def forward(self, levels: list[FeatureLevel], targets: list[ImageTarget] | None = None) -> QueryBatch:
        """Make the queries; see :data:`QUERY_GENERATOR_REGISTRY`."""
        queries = super().forward(levels)
        return queries if targets is None else self.add_denoising(queries, targets)

    def add_denoising(self, queries: QueryBatch, targets: list[ImageTarget]) -> QueryBatch:
        """Return matching queries followed by denoising queries made from the ground truth."""
        clean, num_groups = self.repeat_targets(targets)
        labels, boxes = self.add_noise(clean)
        noisy_content = nn.functional.pad(self.label_embedding(labels), (0, 1), value=1.0)
        noisy_logits = boxes.clamp(1e-3, 1 - 1e-3).logit()
        return QueryBatch(
            content=torch.cat([queries.content, noisy_content], dim=1),
            reference_logits=torch.cat([queries.reference_logits, noisy_logits], dim=1),
            attention_mask=denoising_attention_mask(self.num_queries, num_groups, clean.valid),
            denoising=clean,
            proposals=queries.proposals,
        )

    @property
    def content(self) -> Tensor:
        unknown = self.label_embedding.weight[-1:].expand(self.num_queries, -1)
        return nn.functional.pad(unknown, (0, 1))

    def layout(self, targets: list[ImageTarget]) -> tuple[int, int]:
        """Return the number of slots per group n, and the number of groups G."""
        most = max(1, self.max_denoising_queries // (2 if self.with_negatives else 1))
        slots = min(max(len(target) for target in targets), most)
        return slots, min(self.num_groups, max(1, most // max(slots, 1)))

    def num_denoising(self, targets: list[ImageTarget]) -> int:
        """Return how many denoising queries, without padding and negatives, these targets give."""
        slots, num_groups = self.layout(targets)
        return num_groups * sum(min(len(target), slots) for target in targets)

    @torch.no_grad()
    def repeat_targets(self, targets: list[ImageTarget]) -> tuple[DenoisingTargets, int]:
        """Lay out the boxes of all images in slots, and repeat them for each group.

        Returns:
            The targets (Q_dn = groups * slots, ordered by group; with negatives, each group's own follow its slots), and the
            number of groups.
        """
        slots, num_groups = self.layout(targets)
        device = targets[0].boxes.device
        labels = torch.zeros(len(targets), slots, dtype=torch.long, device=device)
        boxes = torch.full((len(targets), slots, 4), 0.5, device=device)
        counts = [min(len(target), slots) for target in targets]
        for i, (target, count) in enumerate(zip(targets, counts)):
            chosen = slice(None)
            if len(target) > slots:
                chosen = torch.randperm(len(target), device=device)[:slots]
            labels[i, :count] = target.labels[chosen]
            boxes[i, :count] = target.boxes[chosen]
        valid = torch.arange(slots, device=device) < upload(counts, device)[:, None]
        repeats, negative = num_groups, None
        if self.with_negatives:
            repeats = 2 * num_groups
            negative = (torch.arange(repeats, device=device) % 2 == 1).repeat_interleave(slots)
        return DenoisingTargets(
            labels=labels.repeat(1, repeats),
            boxes=boxes.repeat(1, repeats, 1),
            valid=valid.repeat(1, repeats),
            negative=negative,
        ), num_groups

    @torch.no_grad()
    def add_noise(self, targets: DenoisingTargets) -> tuple[Tensor, Tensor]:
        """Return noisy labels (B, Q_dn) and boxes (B, Q_dn, 4), (cx, cy, w, h) in [0, 1]; ``targets`` stay unchanged."""
        size = targets.boxes[..., 2:]
        noise = 2 * torch.rand_like(targets.boxes) - 1
        if targets.negative is not None:
            noise = noise + noise.sign() * targets.negative[:, None]
        boxes = targets.boxes + self.box_noise * noise * torch.cat([size / 2, size], dim=-1)
        redraw = torch.rand_like(targets.boxes[..., 0]) < self.label_noise
        labels = torch.where(redraw, torch.randint_like(targets.labels, self.num_classes), targets.labels)
        return labels, boxes.clamp(0, 1)
