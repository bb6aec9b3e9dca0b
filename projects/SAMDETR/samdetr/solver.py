"""AdamW with a separate learning rate for the backbone, clipping over the whole model (as published), mixed precision."""

import torch
from detectron2.solver.build import build_optimizer as build_sgd
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from .errors import UserError

__all__ = [
    "FullModelClippingAdamW",
    "MovingAverage",
    "autocast",
    "backbone_lr_factor",
    "build_optimizer",
    "set_float32_precision",
]


def autocast(cfg, device: torch.device):
    """Return the context of mixed precision that ``cfg.SOLVER.AMP`` asks for, for training and inference alike."""
    return torch.autocast(device.type, dtype=getattr(torch, cfg.SOLVER.AMP.PRECISION), enabled=cfg.SOLVER.AMP.ENABLED)


class MovingAverage(torch.optim.swa_utils.AveragedModel):
    """The exponential moving average of a model, in a few operations over all tensors, none of which waits for a GPU.

    It is the mean of the weights at all updates, those of n updates ago counted ``decay ** n`` times. In torch's average, the
    first weights count for more than that, so that it is far behind until ``1 / (1 - decay)`` updates have been made several
    times over.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        """
        Args:
            model: is copied; the copy, ``module``, is the average. Its first update is a copy as well.
            decay: from 0, the last weights, to less than 1.
        """
        super().__init__(model)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: torch.nn.Module) -> None:
        """Move the average towards the model's parameters, and copy its buffers."""
        updates = int(self.n_averaged) + 1  # a tensor on the CPU
        share = (1 - self.decay) / (1 - self.decay**updates)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), share)
        torch._foreach_copy_(list(self.module.buffers()), list(model.buffers()))
        self.n_averaged += 1


def set_float32_precision(cfg) -> None:
    """Decide for this process, as ``cfg.FLOAT32_PRECISION`` says, whether products and convolutions in float32 may use TF32.

    "highest" switches it off, "high" and "medium" on; empty leaves both as they are.
    """
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


class FullModelClippingAdamW(torch.optim.AdamW):
    """AdamW that scales all gradients down together if their joint norm exceeds ``max_norm``."""

    def __init__(self, *args, max_norm: float, norm_type: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_norm = max_norm
        self.norm_type = norm_type
        self._measured_norm: torch.Tensor | None = None

    def measure_gradients(self) -> torch.Tensor:
        """Return the joint norm of all gradients; the next :meth:`step` clips by it and does not measure again."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._measured_norm = torch.nn.utils.get_total_norm(gradients, self.norm_type)
        return self._measured_norm

    def zero_grad(self, *args, **kwargs):
        self._measured_norm = None
        super().zero_grad(*args, **kwargs)

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self.measure_gradients() if self._measured_norm is None else self._measured_norm
        self._measured_norm = None
        scale = getattr(self, "grad_scale", None)  # set by a GradScaler that leaves unscaling to the fused step
        if scale is not None:
            norm = norm / scale
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        super().step()
        return loss


def backbone_lr_factor(name: str, multiplier: float) -> float:
    """Return the learning-rate factor of the parameter ``name``: ``multiplier`` in the backbone, else 1."""
    return multiplier if name.startswith("backbone.") else 1.0


def build_optimizer(cfg, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer that ``cfg.SOLVER.OPTIMIZER`` names: detectron2's SGD, or AdamW.

    With AdamW, parameters of ``model.backbone`` learn at ``BASE_LR * BACKBONE_MULTIPLIER``, all others at ``BASE_LR``, each
    times ``model.lr_factor(name)`` if the model has such a method, and biases times ``BIAS_LR_FACTOR``; frozen ones are left
    out. Weight decay applies to everything, as published, unless ``WEIGHT_DECAY_NORM`` or ``WEIGHT_DECAY_BIAS`` say otherwise.

    Raises:
        UserError: ``CLIP_GRADIENTS`` asks for clipping over the full model by something other than the norm.
    """
    if cfg.SOLVER.OPTIMIZER == "SGD":
        return build_sgd(cfg, model)
    own_factor = getattr(model, "lr_factor", lambda name: 1.0)

    def lr_factor(name: str) -> float:
        of_bias = cfg.SOLVER.BIAS_LR_FACTOR if name.endswith("bias") else 1.0
        return backbone_lr_factor(name, cfg.SOLVER.BACKBONE_MULTIPLIER) * own_factor(name) * of_bias

    decay = cfg.SOLVER.WEIGHT_DECAY_BIAS
    parameters = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=decay,
        lr_factor_func=lr_factor,
        overrides=None
        if decay is None
        else {"in_proj_bias": {"weight_decay": decay}},  # which detectron2 does not know
    )
    # A fused step passes over the weights once instead of a dozen times.
    fused = all(p.device.type in ("cpu", "cuda") for group in parameters for p in group["params"])
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.FULL_MODEL:
        if clip.CLIP_TYPE != "norm":
            raise UserError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}, but FULL_MODEL clips by norm: set CLIP_TYPE "
                "'norm' or FULL_MODEL False."
            )
        optimizer = FullModelClippingAdamW(
            parameters, lr=cfg.SOLVER.BASE_LR, fused=fused, max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE
        )
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(parameters, lr=cfg.SOLVER.BASE_LR, fused=fused)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    optimizer.register_load_state_dict_post_hook(_lay_moments_out)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """Keep this optimizer's own setting of ``fused`` when it loads a checkpoint.

    Raises:
        UserError: the parameters are grouped in another way.
        ValueError: something is missing without which the next step would fail.
    """
    own = optimizer.param_groups
    sizes = [[len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], own)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The optimizer of the checkpoint has groups of {sizes[0]} parameters, and that of this config {sizes[1]}. What "
            "decides about them cannot be changed in a run: set MODEL.BACKBONE.FREEZE_AT, SOLVER.BACKBONE_MULTIPLIER, "
            "BIAS_LR_FACTOR, WEIGHT_DECAY_BIAS and WEIGHT_DECAY_NORM as config.yaml in OUTPUT_DIR has them, or start another "
            "run from the weights of the checkpoint."
        )
    for kind, entries, needed in (
        ("parameter group", state_dict["param_groups"], {"lr", "betas", "eps", "weight_decay"}),
        ("state", state_dict["state"].values(), {"step", "exp_avg", "exp_avg_sq"}),
    ):
        missing = {key for entry in entries for key in needed - entry.keys()}
        if missing:
            raise ValueError(f"a {kind} of the optimizer lacks {', '.join(sorted(missing))}")
    groups = [{**group, "fused": mine["fused"]} for group, mine in zip(state_dict["param_groups"], own)]
    return {**state_dict, "param_groups": groups}


def _lay_moments_out(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out in memory like their parameters, which the fused step assumes and a checkpoint may not have.

    Raises:
        ValueError: a moment is of another shape than its parameter.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{name} has the shape {tuple(value.shape)}, and its parameter {tuple(parameter.shape)}"
                )
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
