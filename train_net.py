#!/usr/bin/env python
"""Train a model, or evaluate one with --eval-only: the command ``samdetr train``.

./train_net.py --config-file sam_detr_smca_R_50_1x --num-gpus 8
"""

import signal

if __name__ in ("__main__", "__mp_main__"):  # until a run has begun, Ctrl-C ends it at once, without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("train")
