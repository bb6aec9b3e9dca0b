"""The version, and where detectron2 comes from, which is on no package index. Imports nothing: the installation reads it."""

__version__ = "0.2.0"

DETECTRON2 = "detectron2 @ git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833"

INSTALL_DETECTRON2 = (
    'pip install "setuptools<82" wheel ninja torch torchvision && '
    f'CUDA_VISIBLE_DEVICES="" pip install --no-build-isolation "{DETECTRON2}"'
)
