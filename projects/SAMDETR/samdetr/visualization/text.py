"""Text in pictures."""

from ..errors import one_line

__all__ = ["as_drawn"]


def as_drawn(name: str) -> str:
    """Return a name as matplotlib has to get it so that it is drawn as it is, and not taken for TeX between dollars."""
    return one_line(name).replace("$", r"\$")
