"""Several processes: two with half the batch each do what one does with all of it."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing
from detectron2.engine import create_ddp_model
from detectron2.utils import comm

from helpers import BATCH, BEYOND, CONTRASTIVE, ROOT, SMCA, frozen_statistics, make_step, run_steps, tiny_model
from processes import CONFIG, Script, as_torchrun, environment, free_port, run_script, start_processes
from samdetr.modeling.criterion import average_over_processes

# The second of two processes gets images without a single box.
UNEVEN = [BATCH[0], {**BATCH[2]}, BATCH[1], {**BATCH[2], "file_name": "e.jpg"}]


BATCHES = {"even": BATCH, "one without boxes": UNEVEN}


def train_share(rank, world_size, folder, options, batch, iterations):
    """Train on every ``world_size``-th image from ``rank`` and write what came out."""
    torch.set_num_threads(1)
    if world_size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
        )
        comm.create_local_process_group(world_size)
    torch.manual_seed(0)
    model = frozen_statistics(tiny_model(*options))
    step = make_step(
        create_ddp_model(model, broadcast_buffers=False, device_ids=None), batch[rank::world_size], *options
    )
    losses = run_steps(step, iterations)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({"losses": losses, "gradients": gradients, "weights": model.state_dict()}, f"{folder}/{rank}.pt")
    if world_size > 1:
        torch.distributed.destroy_process_group()


def train_with(world_size, folder, options, batch, iterations=2):
    folder.mkdir()
    arguments = (world_size, str(folder), options, batch, iterations)
    start_processes(train_share, arguments, world_size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("options", [[], ["SOLVER.ACCUMULATION_STEPS", 2]], ids=["", "accumulating"])
def test_two_processes_do_what_one_does(batch, options, tmp_path):
    options = [*SMCA, *BEYOND, *options]
    (one,) = train_with(1, tmp_path / "one", options, batch)
    two = train_with(2, tmp_path / "two", options, batch)
    for name in ("total_loss", "loss_class", "loss_l1_0", "loss_giou"):
        assert two[0]["losses"][name] == pytest.approx(one["losses"][name], rel=1e-4)
    for name, gradient in one["gradients"].items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (two[0]["gradients"][name] - gradient).abs().max() < 1e-3 * scale, name
        assert torch.equal(two[0]["gradients"][name], two[1]["gradients"][name]), name
    for name, weight in one["weights"].items():
        assert torch.allclose(two[0]["weights"][name], weight, atol=1e-5), name


@pytest.mark.slow
def test_a_process_without_boxes_neither_hangs_nor_differs_with_denoising(tmp_path):
    two = train_with(2, tmp_path / "two", [*SMCA, *CONTRASTIVE, *BEYOND], UNEVEN)
    assert all(torch.equal(two[0]["weights"][name], value) for name, value in two[1]["weights"].items())
    assert all(gradient.isfinite().all() for gradient in two[0]["gradients"].values())


def average(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    value = average_over_processes([3.0 * rank, 1.0], torch.device("cpu"))
    torch.save(value, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_normalisers_are_averaged_over_processes(tmp_path):
    start_processes(average, (str(tmp_path),), 2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt").tolist() == [1.5, 1.0]


def train_net_by(launcher, *arguments):
    """Run train_net.py in two processes; return exit codes and the output.

    With "detectron2" and "torchrun", they are started as a user does; the others are forked, see :class:`Script`.
    """
    arguments = [*CONFIG, *map(str, arguments)]
    if launcher in ("detectron2", "torchrun"):
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
        command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(ROOT / "train_net.py")]
        command += [*(["--num-gpus", "2"] if launcher == "detectron2" else []), *arguments]
        result = subprocess.run(command, env=environment(threads=1), capture_output=True, text=True, timeout=300)
        return [result.returncode], result.stdout + result.stderr
    if launcher == "slurm":
        common = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        variables = [{**common, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(2)]
        scripts = [Script("train_net.py", *arguments, threads=1, variables=task) for task in variables]
    elif launcher == "torchrun's variables":
        scripts = as_torchrun("train_net.py", *arguments)
    else:
        url = ["--dist-url", f"tcp://127.0.0.1:{free_port()}"]
        machines = {
            "one machine": [["--num-gpus", "2"]],
            "two machines": [["--num-machines", "2", "--machine-rank", str(rank)] for rank in range(2)],
        }
        scripts = [
            Script("train_net.py", *arguments[:2], *url, *machine, *arguments[2:], threads=1)
            for machine in machines[launcher]
        ]
    results = [script.wait() for script in scripts]
    return [result.returncode for result in results], "".join(result.stdout + result.stderr for result in results)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("detectron2", marks=pytest.mark.thorough),
        pytest.param("torchrun", marks=pytest.mark.thorough),
        "one machine",
        "two machines",
        "torchrun's variables",
        "slurm",
    ],
)
def test_the_script_trains_in_two_processes(launcher, tmp_path):
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path]
    codes, output = train_net_by(launcher, *options)
    assert not any(codes), output[-3000:]
    assert "World size: 2" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "model_final.pth").exists()
    if launcher == "torchrun":
        codes, output = train_net_by("torchrun's variables", "--resume", *options, "SOLVER.MAX_ITER", 3)
        assert not any(codes) and "Starting training from iteration 2" in output, output[-3000:]


@pytest.mark.slow
def test_mistakes_end_in_one_line_with_several_processes(tmp_path):
    codes, output = train_net_by("one machine", "MODEL.SAMDETR.NUM_CLASSES", 3, "OUTPUT_DIR", tmp_path)
    assert codes == [1] and "set MODEL.SAMDETR.NUM_CLASSES 10" in output.splitlines()[-1]
    torch.save({"model": tiny_model("MODEL.SAMDETR.NUM_QUERIES", 3).state_dict()}, tmp_path / "other.pth")
    arguments = ["MODEL.WEIGHTS", tmp_path / "other.pth", "OUTPUT_DIR", tmp_path / "run"]
    codes, output = train_net_by("one machine", *arguments)
    assert codes == [1] and "is of another architecture than the config" in output and "Traceback" not in output


@pytest.mark.slow
def test_an_error_of_a_loader_ends_all_processes_and_their_workers(shapes_root, tmp_path):
    """Each process has started workers, which would keep it from ending."""
    shutil.copytree(shapes_root, tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    dataset = ["damaged", str(tmp_path / "damaged" / "annotations.json"), str(tmp_path / "damaged")]
    options = ["DATASETS.COCO_FORMAT", [dataset], "DATASETS.TRAIN", "('damaged',)", "DATASETS.TEST", "()"]
    options += ["MODEL.SAMDETR.NUM_CLASSES", 2, "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", tmp_path / "run"]
    codes, output = train_net_by("one machine", *options)
    assert codes == [1] and "is not an image that can be read" in output and "Traceback" not in output, output[-3000:]


@pytest.mark.slow
def test_predictions_are_the_same_for_any_number_of_workers_and_processes(tmp_path):
    torch.save({"model": tiny_model("MODEL.SAMDETR.DECODER.NUM_LAYERS", 2).state_dict()}, tmp_path / "model.pth")
    arguments = ["--eval-only", "MODEL.WEIGHTS", tmp_path / "model.pth", "OUTPUT_DIR"]
    for workers in (0, 2):
        folder = tmp_path / f"workers{workers}"
        result = run_script("train_net.py", *CONFIG, *arguments, folder, "DATALOADER.NUM_WORKERS", workers, threads=1)
        assert result.returncode == 0, result.stderr[-3000:]
    codes, output = train_net_by("torchrun's variables", *arguments, tmp_path / "processes")
    assert codes == [0, 0], output[-3000:]
    found = []
    for run_name in ("workers0", "workers2", "processes"):
        with open(os.path.join(tmp_path, run_name, "inference", "coco_instances_results.json")) as f:
            found.append(sorted(json.load(f), key=lambda entry: (entry["image_id"], -entry["score"], entry["bbox"])))
    assert len(found[0]) > 1000 and found[0] == found[1] == found[2]
