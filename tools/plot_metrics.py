#!/usr/bin/env python
"""Draw the curves of one or several runs: loss, AP, learning rate, time and memory.

    tools/plot_metrics.py --input output/demo --output output/demo/curves.png
    tools/plot_metrics.py --input output/a output/b --names "8 heads" "4 heads" --output curves.svg
    tools/plot_metrics.py --input output/mine --published r50_smca_e12 --output curves.png

--published draws the authors' COCO curve of a model beside your own, by epoch.
"""

import argparse
from pathlib import Path

from samdetr.cli.common import output_file, run
from samdetr.errors import UserError
from samdetr.visualization import draw_curves, published_names, read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="RUN", help="OUTPUT_DIRs, or metrics.json files")
    parser.add_argument("--names", nargs="+", help="names of the runs in the legend; by default their folders")
    parser.add_argument(
        "--published", nargs="+", default=[], metavar="NAME", help=f"of: {', '.join(published_names())}"
    )
    parser.add_argument("--output", required=True, help="PNG, SVG or PDF file")
    arguments = parser.parse_args()
    output = output_file(arguments.output, (".png", ".svg", ".pdf"))
    paths = [Path(path) for path in arguments.input]
    names = arguments.names or [str(path if path.is_dir() else path.parent) for path in paths]
    if len(names) != len(paths):
        raise UserError(f"--names has {len(names)} names for {len(paths)} runs.")
    if len(set(names)) != len(names):
        raise UserError(f"The runs need different names: {', '.join(names)}. Use --names.")
    runs = {name: read_metrics(path) for name, path in zip(names, paths)}
    figure = draw_curves(runs, arguments.published)
    figure.savefig(output, dpi=110)
    print(f"{output}: {', '.join(names)}")


if __name__ == "__main__":
    run(main)
