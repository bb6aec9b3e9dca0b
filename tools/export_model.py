#!/usr/bin/env python
"""Export a trained model to ONNX, OpenVINO or torch.export: the command ``samdetr export``.

tools/export_model.py --weights output/demo/model_final.pth --output model.onnx
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("export")
