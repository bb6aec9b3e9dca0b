#!/usr/bin/env python
"""Draw keypoints and attention of a trained model: the command ``samdetr attention``.

tools/visualize_attention.py --weights output/demo/model_final.pth --input street.jpg --output attention
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("attention")
