"""The error for a user's mistake, and text that is safe to show."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

__all__ = ["UserError", "did_you_mean", "import_extra", "one_line", "one_line_each"]


def one_line(text: object) -> str:
    """Return a text, such as a class name from a file, as one line that terminals, logs and pictures can show.

    White space becomes single blanks; control characters and those that cannot be encoded become "\N{REPLACEMENT CHARACTER}".
    """
    joiners = "\u200c\u200d"  # with which some languages write
    words = "".join(
        c if c.isprintable() or c.isspace() or c in joiners else "\N{REPLACEMENT CHARACTER}" for c in str(text)
    ).split()
    return " ".join(words)


def one_line_each(names: Iterable[object]) -> list[str]:
    """Return classes' names as this project compares and writes them; a dataset's own may have line breaks or end in spaces."""
    return [one_line(name) for name in names]


class UserError(ValueError):
    """A mistake in what the user gave; the message, one line, says what it is and what to do, so that no traceback is needed.

    Attributes:
        argument: what the mistake is in, if it is in one thing, by a name from which a command-line program finds its own
            option: "config_file", "source", "input", "output", ...
    """

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(one_line(message))
        self.argument = argument


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return " Did you mean 'X'?" for the choice that resembles ``name`` most; "" if none does."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def import_extra(module: str, package: str) -> ModuleType:
    """Import a module of a package that not everyone needs.

    Raises:
        UserError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"This needs a package: pip install {package} ({error}).") from error
