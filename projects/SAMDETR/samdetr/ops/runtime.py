"""Ask how the code is being run, and choose precision and recomputation accordingly."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["is_tracing", "run_layer", "to_autocast_dtype"]


def is_tracing() -> bool:
    """Return whether the model is being traced, exported or compiled, and should use plain operations only."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast ``x`` to the dtype that torch's own matrix products would cast it to under the current autocast."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def run_layer(layer: Callable, *args, recompute: bool):
    """Call ``layer(*args)``; with ``recompute``, recompute its activations in the backward pass instead of keeping them."""
    if recompute and torch.is_grad_enabled() and not is_tracing():
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)
