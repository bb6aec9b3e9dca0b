"""The error for a user's mistake."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in what the user gave us; the message says what it is and what to do, and needs no traceback."""
