"""One training step: mixed precision, gradient accumulation, and what happens when numbers are not finite."""

import contextlib
import logging
import math
import time

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..ops.runtime import upload
from ..solver import FullModelClippingAdamW, autocast
from .stops import received_signal

__all__ = ["TrainStep"]

logger = logging.getLogger(__name__)

_MOST_SKIPS_IN_A_ROW = 100
_SMALLEST_LOSS_SCALE = 1.0  # float16 gradients that overflow below this would overflow without a scale as well


def step_seed(seed: int, iteration: int, rank: int) -> int:
    """Return the seed of one step's random numbers (the noise of denoising queries) on one process."""
    return int(np.random.SeedSequence((seed, iteration, rank)).generate_state(1)[0])


@contextlib.contextmanager
def _too_few_values_explained(num_images: int):
    """Say what to do when a BatchNorm has one value per channel, as torch does not."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm has one value per channel to normalise (images at a time: {num_images}): raise "
            "SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN, lower SOLVER.ACCUMULATION_STEPS, or use a norm of another kind "
            "(MODEL.RESNETS.NORM 'FrozenBN' or 'GN')."
        ) from error


class TrainStep(SimpleTrainer):
    """One step of training, in place of detectron2's SimpleTrainer and AMPTrainer.

    Each step is seeded by the run's seed, the iteration and the process, so that a resumed run draws the same numbers.

    Attributes:
        agreed_signal: number of the signal by which any of the processes was asked to stop in the last step; 0 if none was.
    """

    def __init__(self, cfg, model, data_loader, optimizer):
        super().__init__(model, data_loader, optimizer)
        self.inner = model.module if isinstance(model, DistributedDataParallel) else model
        self.device = next(model.parameters()).device
        self.autocast = lambda: autocast(cfg, self.device)
        use_scaler = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "float16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=use_scaler)
        self.accumulation_steps = cfg.SOLVER.ACCUMULATION_STEPS
        self.skip_non_finite = cfg.SOLVER.NON_FINITE == "skip"
        self.skips_in_a_row = 0
        self.skip_unreadable = cfg.DATALOADER.UNREADABLE_IMAGES == "skip"
        self.max_unreadable = cfg.DATALOADER.MAX_UNREADABLE_IMAGES
        self.unreadable: set[str] = set()
        self.agreed_signal = 0

    def run_step(self):
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self._count_unreadable(data)
        torch.manual_seed(step_seed(self.data_loader.seed, self.iter, comm.get_rank()))
        self.optimizer.zero_grad()
        statistics = self._batch_statistics() if self.skip_non_finite else []
        before = [buffer.clone() for buffer in statistics]
        names, stacked = self._backward(data)
        self.after_backward()
        self.scaler.unscale_(self.optimizer)
        # One transfer of all numbers: each by itself would wait for the device.
        norm, *values = torch.cat([self._measure_gradients()[None], stacked]).cpu()
        losses = dict(zip(names, values))
        own = all(map(math.isfinite, values)) and (math.isfinite(norm) or self._searches_for_a_scale())
        finite = self._agree(own)
        if finite:
            self._write_metrics(losses, data_time)
            self.skips_in_a_row = 0
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            with torch.no_grad():
                for buffer, value in zip(statistics, before):
                    buffer.copy_(value)
            self._handle_non_finite(losses, norm, data, own)

    def _searches_for_a_scale(self) -> bool:
        """Return whether gradients may overflow: the scaler then skips the step by itself, and takes a smaller scale.

        Once its scale is very small, something else must be wrong.
        """
        return self.scaler.is_enabled() and self.scaler.get_scale() >= _SMALLEST_LOSS_SCALE

    def _agree(self, own_is_finite: bool) -> bool:
        """Decide alike in all processes: return whether all are finite, and set :attr:`agreed_signal`."""
        self.agreed_signal = received_signal() or 0
        if comm.get_world_size() == 1:
            return own_is_finite
        decision = upload([float(own_is_finite), -float(self.agreed_signal)], self.device)
        torch.distributed.all_reduce(decision, torch.distributed.ReduceOp.MIN)
        finite, negative_signal = decision.tolist()
        self.agreed_signal = -int(negative_signal)
        return bool(finite)

    def _measure_gradients(self) -> torch.Tensor:
        """Return the joint norm of all gradients."""
        if isinstance(self.optimizer, FullModelClippingAdamW):
            return self.optimizer.measure_gradients()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def _batch_statistics(self) -> list[torch.Tensor]:
        """Return the running statistics that a forward pass changes."""
        norms = [m for m in self.inner.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm) and m.training]
        return [buffer for norm in norms for buffer in norm.buffers()]

    def _backward(self, data: list[dict]) -> tuple[list[str], torch.Tensor]:
        """Accumulate the gradients of all parts of the batch; return the names and the values of the whole batch's losses."""
        if self.accumulation_steps > len(data):
            raise UserError(
                f"SOLVER.ACCUMULATION_STEPS is {self.accumulation_steps}, more than the {len(data)} images that each "
                "process has per step (SOLVER.IMS_PER_BATCH divided by the number of processes)."
            )
        parts = [data[i :: self.accumulation_steps] for i in range(self.accumulation_steps)]
        options = {}
        if self.accumulation_steps > 1 and hasattr(self.inner, "loss_normalizers"):
            options["normalizers"] = self.inner.loss_normalizers(parts)
        share = 1.0 if options else 1 / self.accumulation_steps
        losses: dict[str, torch.Tensor] = {}
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            wait = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if wait else contextlib.nullcontext():
                with self.autocast(), _too_few_values_explained(len(part)):
                    part_losses = self.model(part, **options)
                total = torch.stack(list(part_losses.values())).sum()
                self.scaler.scale(total * share).backward()
            for name, loss in part_losses.items():
                losses[name] = losses[name] + loss.detach() if name in losses else loss.detach()
        return list(losses), torch.stack(list(losses.values())) * share

    def _handle_non_finite(
        self, losses: dict[str, torch.Tensor], norm: torch.Tensor, data: list[dict], own_is_finite: bool
    ) -> None:
        """Stop or skip this step, as the config says; the message names the losses and images of the processes concerned."""
        values = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
        names = ", ".join(str(inputs.get("file_name", inputs.get("image_id"))) for inputs in data)
        details = f"(gradient norm {norm.item():.4g}; {values}). Images: {names}."
        bad = [text for fine, text in comm.all_gather((own_is_finite, details)) if not fine]
        message = f"Iteration {self.iter}: a loss or gradient is not finite {' '.join(bad)}"
        self.skips_in_a_row += 1
        if not self.skip_non_finite or self.skips_in_a_row > _MOST_SKIPS_IN_A_ROW:
            raise UserError(
                f"{message} Lower SOLVER.BASE_LR, look at these images and their boxes, or skip such steps with "
                'SOLVER.NON_FINITE "skip".'
            )
        logger.warning("%s The step is skipped.", message)
        if self.scaler.is_enabled():
            self.scaler.update()

    def _count_unreadable(self, data: list[dict]) -> None:
        if not self.skip_unreadable:
            return
        new = {name for inputs in data for name in inputs.get("unreadable_files", [])}
        new = set().union(*comm.all_gather(new)) - self.unreadable
        if not new:
            return
        self.unreadable |= new
        get_event_storage().put_scalar("unreadable_images", len(self.unreadable), smoothing_hint=False)
        logger.warning("Images that cannot be used: %d so far, new: %s.", len(self.unreadable), ", ".join(sorted(new)))
        if len(self.unreadable) > self.max_unreadable:
            raise UserError(
                f"{len(self.unreadable)} images cannot be used, more than DATALOADER.MAX_UNREADABLE_IMAGES "
                f"({self.max_unreadable}): repair the dataset, or raise the limit."
            )

    def state_dict(self) -> dict:
        state = super().state_dict()
        state["scaler"] = self.scaler.state_dict()
        state["unreadable"] = sorted(self.unreadable)
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if state_dict.get("scaler"):
            self.scaler.load_state_dict(state_dict["scaler"])
        self.unreadable = set(state_dict.get("unreadable", []))
