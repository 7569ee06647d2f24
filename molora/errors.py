"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """Input that the user can mend. The message says what is wrong, where, and how to mend it.

    Command lines print it on one line without a traceback and leave with exit code 2.
    """
