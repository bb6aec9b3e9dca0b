"""The processes that torchrun or SLURM has started for one command."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from ..errors import UserError

__all__ = ["join_slurm_job", "joined_processes", "was_launched"]


def was_launched() -> bool:
    """Return whether torchrun, or SLURM with several tasks, has started this process; translate SLURM's variables."""
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        join_slurm_job()
    return "LOCAL_RANK" in os.environ


def join_slurm_job() -> None:
    """Translate SLURM's variables into torchrun's, for ``srun`` with one task per process."""
    environment = os.environ
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise UserError(
            "In a SLURM job of several tasks, set MASTER_ADDR to the first node's name and MASTER_PORT to a free port "
            "there, for example: export MASTER_ADDR=$(scontrol show hostnames | head -n 1) MASTER_PORT=29500"
        )
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    nodes = int(environment["SLURM_STEP_NUM_NODES"])
    environment["LOCAL_WORLD_SIZE"] = str(int(environment["SLURM_STEP_NUM_TASKS"]) // nodes)


@contextlib.contextmanager
def joined_processes(cuda: bool, *, until_the_last: bool = False) -> Iterator[None]:
    """Join the processes of :func:`was_launched` into detectron2's group, with a CUDA device each, until the context ends.

    Address, rank and size come from the environment. A launcher may show each process only its own device.

    Args:
        cuda: whether to use CUDA.
        until_the_last: whether each works by itself and they meet at the end, where the first waits for the last for days; it
            is otherwise an error if one waits for half an hour.
    """
    rank = int(os.environ["LOCAL_RANK"])
    if cuda:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    backend = "nccl" if cuda and not until_the_last else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(days=30) if until_the_last else DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    yield
    torch.distributed.destroy_process_group()
