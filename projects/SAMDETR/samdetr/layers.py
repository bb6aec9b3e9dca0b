"""Small building blocks shared by the encoder, the decoder and the heads."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = [
    "MLP",
    "FeedForward",
    "accumulate_product_",
    "autocast",
    "blocks",
    "is_tracing",
    "run_layer",
    "to_autocast_dtype",
    "xavier_uniform_matrices_",
    "zeros_to_accumulate",
]

# Elements of the largest intermediate matrix of a block: on a CPU it stays in the cache, on a GPU it fills the cores.
_BLOCK_ELEMENTS = {"cpu": 2**21}
_BLOCK_ELEMENTS_ELSEWHERE = 2**26


def blocks(images: int, rows: int, row_elements: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut (images, rows) so that the largest intermediate matrix of a block stays small.

    Args:
        images: number of images.
        rows: rows (queries) of each image.
        row_elements: elements of the intermediate matrix for one row.
        device: where it is computed.

    Yields:
        Slices of images and of rows: several whole images, or some rows of one image.
    """
    elements = _BLOCK_ELEMENTS.get(device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    images_a_block = max(1, elements // max(rows * row_elements, 1))
    rows_a_block = max(1, rows if images_a_block > 1 else elements // row_elements)
    for image in range(0, images, images_a_block):
        for row in range(0, rows, rows_a_block):
            yield slice(image, image + images_a_block), slice(row, row + rows_a_block)


def autocast(cfg, device: torch.device):
    """The context of mixed precision by ``cfg.SOLVER.AMP``, for training and inference alike."""
    return torch.autocast(device.type, dtype=getattr(torch, cfg.SOLVER.AMP.PRECISION), enabled=cfg.SOLVER.AMP.ENABLED)


def to_autocast_dtype(x: Tensor) -> Tensor:
    """``x`` in the precision that torch's own matrix products would use for it here."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def accumulate_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b, (B, I, J) and (B, J, K), to ``total``, which is float32 if they are of lower precision."""
    if total.dtype == a.dtype:
        total.baddbmm_(a, b)
    else:
        total += a @ b


def zeros_to_accumulate(like: Tensor) -> Tensor:
    """Contiguous zeros in at least float32, since sums over many blocks lose what lower precision cannot hold."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def is_tracing() -> bool:
    """Whether the model is being traced, exported or compiled, and should show plain operations only."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def xavier_uniform_matrices_(module: nn.Module) -> None:
    """Initialise every parameter of ``module`` with two or more dimensions Xavier-uniformly; leave the others."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def run_layer(layer: Callable, *args, recompute: bool):
    """Call a layer; with ``recompute`` its activations are not kept but computed again in the backward pass."""
    if recompute and torch.is_grad_enabled() and not is_tracing():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


class MLP(nn.Module):
    """Linear layers with a ReLU between them.

    Args:
        widths: the input width, then the output width of each layer; at least two numbers.
    """

    def __init__(self, widths: list[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """A transformer layer's last part: two linear layers, residual, LayerNorm.

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
