#!/usr/bin/env python
"""Detect objects in images, folders of images, and videos: the command ``samdetr predict``.

tools/predict.py --weights output/demo/model_final.pth --input street.jpg --output predictions
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("predict")
