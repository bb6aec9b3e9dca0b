"""Layers that the encoder, the decoder and the heads share."""

import math
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["MLP", "FeedForward", "start_heads_", "start_projections_", "xavier_uniform_matrices_"]


def xavier_uniform_matrices_(module: nn.Module) -> None:
    """Initialise every parameter with two or more dimensions Xavier-uniformly; leave the others as they are."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def start_projections_(*projections: nn.Linear) -> None:
    """Initialise an attention's projections as if their matrices were one, which Xavier's rule then takes for a wider layer.

    torch.nn.MultiheadAttention, which most authors of DETRs use or start from, holds queries', keys' and values' in this way.
    """
    for projection in projections:
        nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(2 / (1 + len(projections))))
        nn.init.zeros_(projection.bias)


def start_heads_(class_head: nn.Linear, box_head: "MLP", prior_prob: float) -> None:
    """Let every class start with the score ``prior_prob``, and every box where it is refined from."""
    nn.init.constant_(class_head.bias, -math.log((1 - prior_prob) / prior_prob))
    nn.init.zeros_(box_head.layers[-1].weight)
    nn.init.zeros_(box_head.layers[-1].bias)


class MLP(nn.Module):
    """Linear layers with a ReLU between them.

    Args:
        widths: the input width, then the output width of each layer; at least two numbers.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def hidden(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-2]), the input of the last layer."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        return self.layers[-1](self.hidden(x))


class FeedForward(nn.Module):
    """The last part of a transformer layer: two linear layers, residual, LayerNorm.

    Args:
        dim: model width C.
        hidden_dim: width between the two linear layers.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.mlp = MLP([dim, hidden_dim, dim])
        self.norm = nn.LayerNorm(dim)
        xavier_uniform_matrices_(self.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return self.norm(x + self.mlp(x))
