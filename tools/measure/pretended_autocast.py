"""Mixed precision on the pretended device of cuda_cost.py: what torch.autocast does on CUDA.

torch has rules for devices that it knows. This gives the same ones to the device of Python backends, for the operations that
occur in models of this project (torch's documentation lists all, "CUDA Ops that can autocast to float16").
"""

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["forget_casts", "register_autocast"]

_KEY = "AutocastPrivateUse1"
_LOWER = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "einsum", "conv2d", "convolution", "prelu")
_FLOAT32 = (
    *("layer_norm", "group_norm", "exp", "log", "log1p", "reciprocal", "rsqrt", "pow.Tensor_Scalar", "pow.Scalar"),
    *("pow.Tensor_Tensor", "cdist", "softplus", "l1_loss", "binary_cross_entropy_with_logits"),
)
_SUMS_IN_FLOAT32 = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "prod", "cumsum")  # by an argument
_WIDEST = ("cat", "stack", "addcdiv", "addcmul", "grid_sampler", "index_put", "scatter_add")

_libraries: list[torch.library.Library] = []  # what is registered is forgotten with its library
# By the weight's id, which stays its own since the weight is kept alive beside its cast.
_casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def forget_casts() -> None:
    """Forget the weights in lower precision, which torch.autocast keeps until its context ends."""
    _casts.clear()


def register_autocast(device: str) -> None:
    """Give torch's rules to the device of that name, once per process."""
    if _libraries:
        return
    rest, aten = torch.library.Library("_", "IMPL", _KEY), torch.library.Library("aten", "IMPL", _KEY)
    rest.fallback(torch.library.fallthrough_kernel)
    rules = {_LOWER: _in_lower, _FLOAT32: _in_float32, _SUMS_IN_FLOAT32: _summing_in_float32, _WIDEST: _in_widest}
    for names, rule in rules.items():
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, _without_autocast(rule(operation, device)))
    _libraries.extend((rest, aten))


def _without_autocast(call: Callable) -> Callable:
    def run(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEY))):
            return call(*args, **kwargs)

    return run


def _call_in(operation: Callable, args, kwargs, device: str, dtype: torch.dtype):
    """Call with the device's tensors of floating point in another type; weights are cast to a lower one once."""

    def cast(value):
        if not torch.is_tensor(value) or value.device.type != device or not value.is_floating_point():
            return value
        if value.dtype == dtype:
            return value
        if value.is_leaf and value.requires_grad and dtype != torch.float32:
            if id(value) not in _casts:
                _casts[id(value)] = value, value.to(dtype)
            return _casts[id(value)][1]
        return value.to(dtype)

    args, kwargs = tree_map(cast, (args, kwargs))
    return operation(*args, **kwargs)


def _in_lower(operation: Callable, device: str) -> Callable:
    def call(*args, **kwargs):
        return _call_in(operation, args, kwargs, device, torch.get_autocast_dtype(device))

    return call


def _in_float32(operation: Callable, device: str) -> Callable:
    def call(*args, **kwargs):
        return _call_in(operation, args, kwargs, device, torch.float32)

    return call


def _summing_in_float32(operation: Callable, device: str) -> Callable:
    def call(*args, **kwargs):
        lower = args[0].is_floating_point() and args[0].dtype != torch.float32 and kwargs.get("dtype") is None
        return operation(*args, **{**kwargs, "dtype": torch.float32} if lower else kwargs)

    return call


def _in_widest(operation: Callable, device: str) -> Callable:
    def call(*args, **kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf) and leaf.is_floating_point()]
        if len({tensor.dtype for tensor in tensors}) > 1:
            return _call_in(operation, args, kwargs, device, torch.float32)
        return operation(*args, **kwargs)

    return call
