#!/usr/bin/env python
"""Read a dataset and report what is wrong with it: the command ``samdetr check``.

tools/check_dataset.py annotations.json images/
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("check")
