"""Where the decoder's queries come from.

Shapes: B images, Q queries, C model width.
"""

import torch
from detectron2.config import configurable
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from .structures import ImageTarget, QueryBatch

__all__ = ["QUERY_GENERATOR_REGISTRY", "LearnedQueryGenerator", "build_query_generator"]

QUERY_GENERATOR_REGISTRY = Registry("QUERY_GENERATOR")
QUERY_GENERATOR_REGISTRY.__doc__ = """
Registry of query generators, chosen by ``cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME``.

A registered class is called as ``Generator(cfg)``. The module it makes is called with the batch size B and, in training,
a list of B :class:`ImageTarget` (else None), and returns a :class:`QueryBatch`. In evaluation it must return the same
queries for every image.
"""


def build_query_generator(cfg) -> nn.Module:
    """Build the query generator by ``cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME``."""
    return QUERY_GENERATOR_REGISTRY.get(cfg.MODEL.SAMDETR.QUERY_GENERATOR.NAME)(cfg)


@QUERY_GENERATOR_REGISTRY.register()
class LearnedQueryGenerator(nn.Module):
    """A fixed number of queries: learned reference boxes, contents that start at zero."""

    @configurable
    def __init__(self, *, num_queries: int, dim: int):
        """
        Args:
            num_queries: number of queries Q.
            dim: model width C.
        """
        super().__init__()
        self.dim = dim
        self.reference_logits = nn.Parameter(torch.randn(num_queries, 4))

    @classmethod
    def from_config(cls, cfg):
        return {"num_queries": cfg.MODEL.SAMDETR.NUM_QUERIES, "dim": cfg.MODEL.SAMDETR.HIDDEN_DIM}

    def forward(self, batch_size: int, targets: list[ImageTarget] | None = None) -> QueryBatch:
        """See :data:`QUERY_GENERATOR_REGISTRY`."""
        content: Tensor = self.reference_logits.new_zeros(batch_size, len(self.reference_logits), self.dim)
        return QueryBatch(content, self.reference_logits.expand(batch_size, -1, -1))
