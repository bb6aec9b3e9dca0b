"""The command ``samdetr``: one module per subcommand, each of them also behind a script of the repository.

A command's module has ``add_arguments(parser)`` and ``main(arguments)``, which returns the exit status or None; its docstring
is the text of ``--help``. Nothing else of the package imports these modules, and only they name options.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from .common import run

__all__ = ["COMMANDS", "main", "make_parser", "run_command"]

COMMANDS = {
    "train": "train a model",
    "evaluate": "measure the AP of a checkpoint",
    "predict": "detect objects in images, folders and videos",
    "check": "read a dataset and report what is wrong with it",
    "report": "write one HTML page about a run",
    "attention": "draw keypoints and attention of a trained model",
    "export": "export a trained model to ONNX, OpenVINO or torch.export",
    "demo-app": "show detections and attention on a page in the browser",
    "benchmark": "measure time and memory of configs",
}


def add_command(parser: argparse.ArgumentParser, name: str) -> None:
    """Add a command's description and arguments to a parser."""
    module = importlib.import_module(f".{name.replace('-', '_')}", __name__)
    parser.description = module.__doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parser)
    parser.set_defaults(main=module.main)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``samdetr`` with all its commands."""
    from .. import __version__

    parser = argparse.ArgumentParser(prog="samdetr", description="SAM-DETR++, a detector of objects in images.")
    parser.add_argument("--version", action="version", version=f"samdetr {__version__}")
    _add_completion(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        add_command(commands.add_parser(name, help=summary), name)
    return parser


def _add_completion(parser: argparse.ArgumentParser) -> None:
    """Add the option that prints a shell's completion script, if shtab is installed."""
    try:
        import shtab
    except ImportError:
        text = "print a script for the shell's completion (needs: pip install shtab)"
        parser.add_argument("--print-completion", action=_NeedsShtab, metavar="SHELL", help=text)
    else:
        shtab.add_argument_to(parser, "--print-completion", help="print a script for the shell's completion")


class _NeedsShtab(argparse.Action):
    """Ends with the line that installs shtab."""

    def __call__(self, parser, *_):
        parser.exit(1, "error: --print-completion needs a package: pip install shtab\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the command line names, and exit with its status."""
    parsed = make_parser().parse_args(arguments)
    run(lambda: parsed.main(parsed))


def run_command(name: str) -> None:
    """Run one command as a script of its own, and exit with its status."""
    parser = argparse.ArgumentParser(prog=os.path.basename(sys.argv[0]))
    add_command(parser, name)
    arguments = parser.parse_args()
    run(lambda: arguments.main(arguments))
