#!/usr/bin/env python
"""Write one HTML page about a run: the command ``samdetr report``.

tools/report.py --input output/demo --output report.html
"""

from samdetr.cli import run_command

if __name__ == "__main__":
    run_command("report")
