"""Train a model, and evaluate it while it trains.

    samdetr train --config-file sam_detr_smca_R_50_1x --num-gpus 8
    samdetr train --config-file my.yaml SOLVER.BASE_LR 0.00005 OUTPUT_DIR output/mine
    samdetr train --config-file my.yaml --resume
    torchrun --nproc-per-node 8 -m samdetr train --config-file my.yaml
    srun --ntasks-per-node 8 samdetr train --config-file my.yaml

A config is a path, or the name of one of this project's. KEY VALUE pairs at the end replace what it says.
"""

import argparse
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from pathlib import Path

import torch
from detectron2.engine import default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..checkpoint import Checkpoint
from ..checkpoint.checkpoint import write_atomically
from ..checks import check_config, ignored_keys
from ..config import find_config, load_config, merge_options
from ..data import register_datasets
from ..data.build import end_workers
from ..engine import Trainer, evaluate
from ..engine.output import lock_folder
from ..engine.stops import StopRequested, is_lost_partner, pass_signals_on
from ..errors import UserError
from ..solver import set_float32_precision
from .launch import joined_processes, was_launched

logger = logging.getLogger("detectron2")


def base_config(args):
    """Return the config that the arguments name: a file's, or the one that the checkpoint carries."""
    if args.config_file:
        args.config_file = find_config(args.config_file)  # detectron2 opens it to copy it into the log
        return load_config(args.config_file)
    if not args.weights:
        raise UserError("name a config, or in --weights a checkpoint that carries one.", argument="config_file")
    cfg = Checkpoint.read(args.weights, name="--weights").config()
    if cfg is None:
        raise UserError(
            f"{args.weights} carries no config: name the one that it was trained with.", argument="config_file"
        )
    return cfg


def read_config(args):
    """Read the config, register its datasets, and check everything that can be known before the start."""
    if args.eval_only and args.resume:
        raise UserError(
            "--resume goes on training: to evaluate, leave it out, and name the checkpoint in MODEL.WEIGHTS."
        )
    cfg = base_config(args)
    merge_options(cfg, [*(("MODEL.WEIGHTS", args.weights) if args.weights else ()), *args.opts])
    if cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        logger.warning("MODEL.DEVICE is cuda, but there is no CUDA device here: using the CPU.")
    if cfg.MODEL.DEVICE == "cuda" and torch.cuda.device_count() < args.num_gpus:
        raise UserError(
            f"--num-gpus is {args.num_gpus}, but this machine has {torch.cuda.device_count()} CUDA devices."
        )
    processes = max(1, args.num_gpus * args.num_machines)
    if cfg.MODEL.DEVICE.startswith("cuda:") and (processes > 1 or "LOCAL_RANK" in os.environ):
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but each process needs a device of its own: set it to 'cuda', and choose "
            "devices by CUDA_VISIBLE_DEVICES."
        )
    batch = cfg.SOLVER.IMS_PER_BATCH
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:  # the batch grows with the number of processes
        batch = round(batch * processes / cfg.SOLVER.REFERENCE_WORLD_SIZE)
    if not args.eval_only and batch % processes:
        raise UserError(f"SOLVER.IMS_PER_BATCH ({batch}) must be a multiple of the number of processes ({processes}).")
    images = batch // processes
    if not args.eval_only and images < cfg.SOLVER.ACCUMULATION_STEPS:
        raise UserError(
            f"SOLVER.ACCUMULATION_STEPS is {cfg.SOLVER.ACCUMULATION_STEPS}, more than the {images} images that each process "
            "has per step (SOLVER.IMS_PER_BATCH divided by the number of processes)."
        )
    cfg.freeze()
    earlier = any(Path(str(cfg.OUTPUT_DIR)).glob("model_*.pth"))
    if earlier and not (args.resume or args.eval_only):
        raise UserError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} holds the checkpoints of an earlier run: continue it with --resume, or name "
            "another OUTPUT_DIR."
        )
    if args.resume and earlier and args.weights:
        logger.warning("--weights %s is not used: --resume goes on from the checkpoints in OUTPUT_DIR.", args.weights)
    register_datasets(cfg)
    check_config(cfg, training=not args.eval_only, weights=not (earlier and args.resume))
    if ignored := ignored_keys(cfg):
        logger.warning("Nothing reads these keys, which the config changes: %s.", ", ".join(ignored))
    return cfg


def work(args, cfg):
    """Train or evaluate, in each process."""
    # Attention's smallest probabilities are denormal numbers, which CPUs multiply many times more slowly than zeros.
    torch.set_flush_denormal(True)
    logging.raiseExceptions = False  # a full disk is said once, by what fails, and not by every line of the log
    name = f" (process {comm.get_rank()})" if comm.get_world_size() > 1 else ""
    try:
        set_up(args, cfg)
        if args.eval_only:
            return evaluate(cfg)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    except UserError as error:
        sys.exit(f"error{name}: {error}")
    except OSError as error:  # such as a full disk
        remedy = ""
        if not args.eval_only and any(Path(cfg.OUTPUT_DIR).glob("model_*.pth")):
            remedy = " What was saved before is whole: mend this, and go on with --resume."
        sys.exit(f"error{name}: {error}.{remedy}")
    except StopRequested:
        if not args.eval_only and comm.is_main_process():
            print(f"Continue with: --resume OUTPUT_DIR {cfg.OUTPUT_DIR}", file=sys.stderr)
        raise
    except RuntimeError as error:
        if not is_lost_partner(error):
            raise
        sys.exit(
            f"error{name}: another process of this run has ended, see its own message. Start all of them again, with --resume."
        )
    finally:
        end_workers()


def set_up(args, cfg):
    """Register the config's datasets, and set up OUTPUT_DIR with the config and the logs."""
    register_datasets(cfg)
    folder, rank = Path(cfg.OUTPUT_DIR), comm.get_rank()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {folder} cannot be written to ({error.strerror}): name another one, OUTPUT_DIR FOLDER."
        ) from error
    for name in ("fvcore", "detectron2"):
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name=name, configure_stdout=False)
    # The config that a checkpoint was trained with stays beside it. default_setup would replace it.
    without_folder = cfg.clone()
    without_folder.defrost()
    without_folder.OUTPUT_DIR = None
    default_setup(without_folder, args)
    if comm.is_main_process():
        logger.info("Running with full config:\n%s", cfg.dump())
        name = "config.yaml"
        if Path(folder, name).is_file() and any(folder.glob("model_*.pth")):
            name = "config_eval.yaml" if args.eval_only else "config_resumed.yaml"
        with write_atomically(folder / name) as file:
            file.write(cfg.dump().encode())
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="samdetr")
    set_float32_precision(cfg)
    bfloat16 = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.PRECISION == "bfloat16" and cfg.MODEL.DEVICE.startswith("cuda")
    if bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(
            "%s has no bfloat16 of its own and emulates it, which is slow: use SOLVER.AMP.PRECISION 'float16'.",
            torch.cuda.get_device_name(),
        )


def run(args):
    """Check everything, take hold of OUTPUT_DIR, and run."""
    launched = was_launched()
    if args.num_gpus < 0 or args.num_machines < 1:
        raise UserError("--num-gpus must be 0 or more, and --num-machines 1 or more.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank is {args.machine_rank}: with --num-machines {args.num_machines}, ranks are 0 to "
            f"{args.num_machines - 1}."
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise UserError("With several machines, name the first one's address in --dist-url: tcp://HOST:PORT.")
    if args.dist_url != "auto" and not re.fullmatch(r"tcp://[^/]+:\d+|file:///.+|env://.*", args.dist_url):
        raise UserError(f"--dist-url is {args.dist_url!r}: give tcp://HOST:PORT or file:///PATH.")
    if args.machine_rank == 0 and args.num_gpus * args.num_machines > 1 and not launched:
        check_port_is_free(args.dist_url)
    cfg = read_config(args)
    main_machine = args.machine_rank == 0 and int(os.environ.get("RANK", 0)) == 0
    with lock_folder(cfg.OUTPUT_DIR) if main_machine and not args.eval_only else contextlib.nullcontext():
        start(args, cfg, launched)


def check_port_is_free(url):
    """Refuse a tcp:// address whose port is taken: the processes themselves would end with a traceback after half a minute."""
    port = re.fullmatch(r"tcp://.+:(\d+)", url)
    if not port:
        return
    try:
        socket.create_server(("", int(port[1]))).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--dist-url {url}: {error}. Name an address of this machine with a free port.") from error


def start(args, cfg, launched):
    """Start the processes, unless torchrun or SLURM has started them, and run."""
    cuda = cfg.MODEL.DEVICE.startswith("cuda")
    if not cuda:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # detectron2 uses NCCL wherever it sees a GPU
    if not launched:
        with pass_signals_on() if args.num_gpus > 1 else contextlib.nullcontext():
            launch(work, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args, cfg))
        return
    with joined_processes(cuda):
        work(args, cfg)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-file", default="", metavar="CONFIG", help="path, or name of one of this project's configs"
    )
    parser.add_argument("--weights", help="checkpoint to start from or to evaluate, in place of MODEL.WEIGHTS")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, and do not train")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine; processes, with MODEL.DEVICE cpu")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine's number, from 0")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://HOST:PORT of the first machine; auto: a free port here"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="replace what the config says")


def main(arguments: argparse.Namespace) -> None:
    try:
        run(arguments)
    except torch.multiprocessing.ProcessExitedException as error:
        # A negative code is that of a signal; otherwise the process has said why.
        if error.exit_code in (-signal.SIGINT, -signal.SIGTERM):
            sys.exit(128 - error.exit_code)
        sys.exit(f"error: {error}" if error.exit_code < 0 else error.exit_code)
    except torch.multiprocessing.ProcessRaisedException as error:
        kind, _, message = str(error).strip().splitlines()[-1].partition(": ")
        if not kind.endswith("DistNetworkError"):
            raise
        sys.exit(
            f"error: --dist-url {arguments.dist_url}: {message}. Name an address of the first machine that all others reach."
        )
