"""Run this project's scripts, each in a process of its own.

The processes are forked from a server that has imported torch, detectron2 and samdetr already, which saves seconds each.
"""

import contextlib
import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "projects" / "SAMDETR"
TINY_CONFIG = ROOT / "configs" / "quick_schedules" / "sam_detr_digits_instant_test.yaml"
CONFIG = ["--config-file", str(TINY_CONFIG)]
# The server imports the package of this tree, whatever else is installed.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE), os.environ.get("PYTHONPATH")]))
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "samdetr.cli.train",
        "detectron2.engine",
        "detectron2.utils.visualizer",
        "matplotlib.pyplot",
        "torch.utils.tensorboard",
    ]
)


def environment(threads: int | None = None) -> dict[str, str]:
    """Return the environment of a process that uses this tree's package, by default with as many threads as this process."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}


def _run(script: str, arguments: list[str], output: str, variables: dict[str, str], group: bool) -> None:
    """What a forked process does: become the script."""
    if group:
        os.setsid()
    # Processes that the script starts are forked, too.
    torch.multiprocessing.start_processes = functools.partial(
        torch.multiprocessing.start_processes, start_method="fork"
    )
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(os.path.join(output, name), "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(ROOT)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))
    sys.argv = [script, *arguments]
    # As if started by itself: no folder of the tests or tools that it does not add.
    own = [path for path in sys.path if Path(path).is_relative_to(ROOT) and not Path(path).is_relative_to(sys.prefix)]
    sys.path = [os.path.dirname(script), str(PACKAGE), *(path for path in sys.path if path not in own)]
    runpy.run_path(script, run_name="__main__")


class Script:
    """A running script, whose output goes to files.

    Args:
        script: its path in the tree.
        arguments: of its command line.
        threads: see :func:`environment`.
        variables: environment variables besides those of this process.
        group: whether it leads a group of processes of its own, as a command does that a terminal has started.
    """

    def __init__(self, script, *arguments, threads=None, variables=None, group=False):
        self._output = tempfile.TemporaryDirectory()
        self.arguments = [str(argument) for argument in arguments]
        variables = {**environment(threads), **(variables or {})}
        target = (str(ROOT / script), self.arguments, self._output.name, variables, group)
        self.process = _CONTEXT.Process(target=_run, args=target)
        self.process.start()

    def wait(self, timeout=300) -> subprocess.CompletedProcess:
        """Wait for the end; return what the script printed, and its exit status."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self.arguments} ran longer than {timeout} s")
        texts = [Path(self._output.name, name) for name in ("stdout", "stderr")]
        stdout, stderr = (path.read_text() if path.exists() else "" for path in texts)
        self._output.cleanup()
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, stdout, stderr)


def run_script(script, *arguments, **options) -> subprocess.CompletedProcess:
    """Run a script of this project, named by its path in the tree."""
    return Script(script, *arguments, **options).wait()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def as_torchrun(script, *arguments, number=2) -> list[Script]:
    """Start a script as torchrun does with ``--nproc-per-node``: as several processes that find each other by variables."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(number)}
    common["LOCAL_WORLD_SIZE"] = str(number)
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return [Script(script, *arguments, threads=1, variables={**common, **rank}) for rank in ranks]


def start_processes(function, arguments: tuple, number: int) -> None:
    """Call ``function(rank, *arguments)`` in several processes at once, and wait for them."""
    torch.multiprocessing.start_processes(function, arguments, nprocs=number, start_method="forkserver")


def run_tool(name, *arguments, **options) -> subprocess.CompletedProcess:
    """Run a script of tools/."""
    return run_script(f"tools/{name}", *arguments, **options)


def train_net(*arguments) -> subprocess.CompletedProcess:
    """Run train_net.py with the tiny config."""
    return run_script("train_net.py", *CONFIG, *arguments)


@contextlib.contextmanager
def alone(lock: Path):
    """Wait until no other process is inside a context with the same lock file."""
    import fcntl

    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
