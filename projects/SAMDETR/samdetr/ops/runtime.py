"""Ask how the code is being run, and choose precision and recomputation accordingly."""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = [
    "autocast_dtype",
    "exact_products",
    "is_tracing",
    "products_are_exact",
    "run_layer",
    "to_autocast_dtype",
    "triton_runs_on",
    "upload",
]

logger = logging.getLogger(__name__)


def is_tracing() -> bool:
    """Return whether the model is being traced, exported or compiled, and should use plain operations only."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


@functools.lru_cache
def triton_runs_on(device_type: str) -> bool:
    """Return whether Triton's kernels can run on a type of device; say once why they cannot."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # runs them on the CPU, slowly, for tests
    if importlib.util.find_spec("triton") is None:
        reason = "the package triton is missing (pip install triton)"
    elif device_type == "cuda" or interpreted:
        return True
    else:
        reason = f"these need CUDA, and the model runs on {device_type}"
    logger.warning("Triton's kernels were asked for, but %s: torch's are used.", reason)
    return False


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that torch's own matrix products would cast ``x`` to under the current autocast."""
    device = x.device.type
    lower = torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lower else x.dtype


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast ``x`` to :func:`autocast_dtype`."""
    return x.to(autocast_dtype(x))


def products_are_exact() -> bool:
    """Return whether matrix products in float32 are computed as such on CUDA, and not in TF32."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the process has set torch's newer switches, which must not be mixed with this one
        return torch.backends.cuda.matmul.fp32_precision in ("ieee", "none")


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Switch TF32 off inside this context, by torch's newer switches if the process has set those."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:
        switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        try:
            yield
        finally:
            for switch, value in zip(switches, before):
                switch.fp32_precision = value
        return
    if precision != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if precision != "highest":
            torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Compute matrix products in float32 as such inside this context, without mixed precision and TF32.

    Their backward pass, which comes later, is computed as everything else is.
    """
    with contextlib.nullcontext() if is_tracing() else _without_tf32(), torch.autocast(device.type, enabled=False):
        yield


def run_layer(layer: Callable, *args, recompute: bool, random: bool = True):
    """Call ``layer(*args)``; with ``recompute``, recompute its activations in the backward pass instead of keeping them.

    ``random`` tells whether the layer may draw random numbers, which are then the same when it is recomputed.
    """
    if recompute and torch.is_grad_enabled() and not is_tracing():
        return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=random)
    return layer(*args)


def upload(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return Python numbers, or a tensor, as a tensor on ``device``, without waiting until it has arrived.

    A copy to CUDA from memory that is not pinned would wait for all that the device has yet to do.
    """
    values = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "cpu")
