#!/usr/bin/env python3
"""Make the project's virtual environment ``.venv``, or leave it alone if it is up to date.

Needs Python 3.10 or newer, git and a C++ compiler (for detectron2), and a package index. Set DETECTRON2 to a path or a
requirement to take detectron2 from there instead of from its repository; one that is installed already stays. Anything that
pip reads from the environment (PIP_INDEX_URL, for example for torch without CUDA) applies.
"""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABOUT = ROOT / "projects" / "SAMDETR" / "samdetr" / "about.py"
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"
STAMP = ENVIRONMENT / ".samdetr-installed"


def stop(message: str) -> None:
    sys.exit(f"setup failed: {message}")


def run(arguments: list[str], failure: str) -> None:
    print("+", " ".join(arguments), flush=True)
    # Where it sees a GPU and an nvcc, detectron2 would build its CUDA ops, which fails if the nvcc does not fit torch; none of
    # them is needed here.
    if subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "FORCE_CUDA": "0"}
    ).returncode:
        stop(failure)


def has_module(name: str) -> bool:
    return subprocess.run([PYTHON, "-c", f"import {name}"], capture_output=True).returncode == 0


def check_machine() -> None:
    """Stop with one line if something is missing that pip cannot install."""
    if sys.version_info < (3, 10):
        stop(f"Python 3.10 or newer is needed, and this is {sys.version.split()[0]}: run make with a newer python3.")
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        stop("Python's venv module is missing: install it (Debian: apt-get install python3-venv).")


def check_compiler() -> None:
    """Stop with one line if detectron2 cannot be fetched and built."""
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        stop("a C++ compiler is missing, which detectron2 is built with: install one (Debian: apt-get install g++).")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        stop("Python's headers are missing, which detectron2 is built with (Debian: apt-get install python3-dev).")
    if "DETECTRON2" not in os.environ and not shutil.which("git"):
        stop("git is missing, which fetches detectron2: install it, or set DETECTRON2 to a local copy.")


def detectron2_requirement() -> str:
    """Return the requirement that installs detectron2: the pinned one, or what DETECTRON2 says."""
    given = os.environ.get("DETECTRON2", "").strip()
    path = Path(given).expanduser()
    if not given:
        return runpy.run_path(str(ABOUT))["DETECTRON2"]
    if path.exists():
        return f"detectron2 @ {path.resolve().as_uri()}"
    return given if given.startswith("detectron2") else f"detectron2 @ {given}"


def main() -> None:
    source = b"".join(path.read_bytes() for path in (ROOT / "setup.py", ABOUT, Path(__file__)))
    fingerprint = hashlib.sha256(source + os.environ.get("DETECTRON2", "").encode()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == fingerprint and PYTHON.exists():
        return
    check_machine()
    if not PYTHON.exists():
        run([sys.executable, "-m", "venv", str(ENVIRONMENT)], "python3 -m venv did not work, see above.")
    pip = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    index = (
        "no package index could be reached, or it lacks a package (see above): check the network and pip's settings."
    )
    run([*pip, "setuptools<82", "wheel", "ninja"], index)
    if not (has_module("torch") and has_module("torchvision")):
        run([*pip, "torch>=2.6", "torchvision"], index)
    if not has_module("detectron2"):
        check_compiler()
        run(
            [*pip, "--no-build-isolation", detectron2_requirement()],
            "detectron2 could not be installed (see above): if its repository cannot be reached from here, set "
            "DETECTRON2=<path to a copy of detectron2> and run this again.",
        )
    run([*pip, "--no-build-isolation", "--editable", ".[test,demo]"], index)
    STAMP.write_text(fingerprint)


if __name__ == "__main__":
    main()
